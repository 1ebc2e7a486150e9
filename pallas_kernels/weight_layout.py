"""How INT4 weights lie in memory for the Hopper matmul: tiles that a warpgroup streams and converts in registers.

A tile stands for 64 outputs by 128 inputs and is one contiguous block of memory, four shares of 16 outputs each:

    [2][32 lanes][4 words]   codes, 1 KB
    [groups][8][2]           group scales, e4m3 or bf16

Lane 4 r + q of warp w, whose share is the w-th, feeds the outputs 16 w + r and 16 w + r + 8 of the tile to the tensor
core. Its word u carries the codes of its operand registers 2u (bits 7 and 2..0 of each byte) and 2u + 1 (bit 3 of the
next byte and bits 6..4); operand register 4 b + 2 h + o is, for o = 0 and 1, output 16 w + r + 8 o at inputs
32 b + 16 h + 4 q + 0..3.
A code is stored as a sign and, where that is set, its magnitude less one.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.packing import pack_int4, unpack_int4

TILE_N = 64
TILE_K = 128
SHARES = 4
SHARE_N = TILE_N // SHARES
CODE_WORDS = SHARE_N * TILE_K // 8  # of a share
GROUP_SIZES = (32, 64, 128)


def can_tile(n: int, group_size: int) -> bool:
    """Whether a weight with n outputs and such groups has tiles that the kernels take."""
    return n % TILE_N == 0 and group_size in GROUP_SIZES


def share_bytes(group_size: int, scale_dtype: Any) -> int:
    """Bytes of a share of a tile; whole 16 bytes."""
    return 4 * CODE_WORDS + SHARE_N * (TILE_K // group_size) * jnp.dtype(scale_dtype).itemsize


def tile_shape(group_size: int, scale_dtype: Any) -> tuple[int, int]:
    """A tile's 32-bit words as a matrix that one tensor-map copy takes: rows of at most 256 words, whole 16 bytes."""
    words = SHARES * share_bytes(group_size, scale_dtype) // 4
    rows = next(r for r in range(-(-words // 256), words) if words % r == 0 and words // r % 4 == 0)
    return rows, words // rows


def tiles_shape(n: int, k: int, group_size: int, scale_dtype: Any) -> tuple[int, int, int, int]:
    """The shape of :func:`to_tiles`'s result for a weight ``[n, k]``."""
    return -(-n // TILE_N), -(-k // TILE_K), *tile_shape(group_size, scale_dtype)


def to_tiles(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Packs codes and scales for the kernel.

    Args:
      codes: ``[n, k / 2]`` uint8, two int4 codes per byte.
      scales: ``[n, k / g]`` e4m3 or bf16, none of them zero; g is 32, 64 or 128.

    Returns:
      int32 ``[ceil(n / 64), ceil(k / 128), *tile_shape]``. Outputs and inputs behind the last one have codes 0 and
      scales 1.
    """
    n, groups = scales.shape
    k = 2 * codes.shape[1]
    g = k // groups
    rows, steps, *tile = tiles_shape(n, k, g, scales.dtype)
    values = jnp.pad(unpack_int4(codes), ((0, rows * TILE_N - n), (0, steps * TILE_K - k)))
    # [row tile, warp, o, r, step, b, h, q, byte] -> [row tile, step, b, h, warp, r, q, byte, o], where u = 2 b + h
    values = values.reshape(rows, 4, 2, 8, steps, 4, 2, 4, 4).transpose(0, 4, 5, 6, 1, 3, 7, 8, 2)
    negative = (values < 0).astype(jnp.uint32)
    magnitude = jnp.where(values < 0, -1 - values, values).astype(jnp.uint32)
    fields = (negative << 7 | magnitude) << (8 * jnp.arange(4, dtype=jnp.uint32)[:, None])
    even, odd = fields[..., 0], fields[..., 1]
    words = jnp.sum(even | odd << 4 | odd >> 28, axis=-1, dtype=jnp.uint32)  # the bytes' bits are disjoint
    # [row tile, step, u // 4, u % 4, warp, lane] -> [row tile, step, warp, u // 4, lane, u % 4]
    words = words.reshape(rows, steps, 2, 4, 4, 32).transpose(0, 1, 4, 2, 5, 3)
    words = jax.lax.bitcast_convert_type(words, jnp.int32).reshape(rows, steps, SHARES, CODE_WORDS)

    per_tile = TILE_K // g
    behind = ((0, rows * TILE_N - n), (0, steps * per_tile - groups))
    padded = jnp.pad(scales, behind, constant_values=jnp.ones((), scales.dtype))
    # [row tile, warp, o, r, step, group] -> [row tile, step, warp, group, r, o]
    padded = padded.reshape(rows, 4, 2, 8, steps, per_tile).transpose(0, 4, 1, 5, 3, 2)
    padded = padded.reshape(rows, steps, SHARES, -1, 4 // scales.dtype.itemsize)
    padded = jax.lax.bitcast_convert_type(padded, jnp.int32)
    return jnp.concatenate([words, padded], axis=-1).reshape(rows, steps, *tile)


def from_tiles(tiles: jax.Array, n: int, k: int, group_size: int, scale_dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Inverse of :func:`to_tiles`, bit for bit: packed codes ``[n, k / 2]`` and scales ``[n, k / g]``."""
    rows, steps = tiles.shape[:2]
    flat = tiles.reshape(rows, steps, SHARES, -1)
    words = jax.lax.bitcast_convert_type(flat[..., :CODE_WORDS], jnp.uint32)
    words = words.reshape(rows, steps, 4, 2, 32, 4).transpose(0, 1, 3, 5, 2, 4).reshape(rows, steps, 4, 2, 4, 8, 4)
    fields = jnp.stack([words, words >> 4 | words << 28], axis=-1)[..., None, :]
    fields = fields >> (8 * jnp.arange(4, dtype=jnp.uint32)[:, None])
    magnitude, negative = (fields & 7).astype(jnp.int8), (fields >> 7 & 1).astype(bool)
    values = jnp.where(negative, -1 - magnitude, magnitude)
    # [row tile, step, b, h, warp, r, q, byte, o] -> [row tile, warp, o, r, step, b, h, q, byte]
    values = values.transpose(0, 4, 8, 5, 1, 2, 3, 6, 7).reshape(rows * TILE_N, steps * TILE_K)
    per_tile = TILE_K // group_size
    scales = jax.lax.bitcast_convert_type(flat[..., CODE_WORDS:], scale_dtype)
    scales = scales.reshape(rows, steps, SHARES, per_tile, 8, 2).transpose(0, 2, 5, 4, 1, 3)
    scales = scales.reshape(rows * TILE_N, steps * per_tile)
    return pack_int4(values[:n, :k]), scales[:n, : k // group_size]


def tiled_bytes(n: int, k: int, group_size: int, scale_dtype: Any) -> int:
    """Bytes of :func:`to_tiles`'s result."""
    return 4 * math.prod(tiles_shape(n, k, group_size, scale_dtype))

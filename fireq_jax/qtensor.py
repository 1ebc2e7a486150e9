"""The quantised leaves of a parameter pytree."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import Numerics, can_tile, dequantize_int4, from_tiles, has_hopper_gpu, to_tiles

Layout = Literal["rows", "tiles", "auto"]


class _Rounded:
    """What all rounded weights have in common."""

    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the float weight this stands for."""
        return (*self.out_shape, *self.in_shape)


class _Int4(_Rounded):
    """What int4 weights of every layout have in common."""

    @property
    def rows(self) -> "Int4Weight":
        """The weight with its codes in rows."""
        raise NotImplementedError

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The weight as an array of ``shape``; exact in float32, rounded otherwise."""
        rows = self.rows
        w = dequantize_int4(rows.codes, rows.scales, rows.tensor_scale)
        return w.reshape(self.shape).astype(dtype)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "tensor_scale"],
    meta_fields=["out_shape", "in_shape", "numerics", "activations"],
)
@dataclass(frozen=True)
class Int4Weight(_Int4):
    """A linear weight ``W[n, k] ≈ codes · scales · tensor_scale``.

    Here n is the product of ``out_shape`` and k that of ``in_shape``: heads keep an axis of their own in the float
    weight this came from, and their sizes stay readable.

    Attributes:
      codes: ``[n, k / 2]`` uint8, packed int4 (:func:`pallas_kernels.pack_int4`).
      scales: ``[n, k / g]`` e4m3 or bf16, non-zero.
      tensor_scale: scalar float32, a power of two; 1 for bf16 scales.
      out_shape: logical output axes, e.g. ``(heads, head_dim)`` for q.
      in_shape: logical input axes, e.g. ``(heads, head_dim)`` for o.
      numerics: how the product is computed, see :func:`pallas_kernels.int4_fp8_matmul`.
      activations: "fp8" if the input is rounded to e4m3 per token, "none" if not.
    """

    codes: jax.Array
    scales: jax.Array
    tensor_scale: jax.Array
    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    numerics: Numerics = "exact"
    activations: Literal["fp8", "none"] = "fp8"

    @property
    def group_size(self) -> int:
        """Neighbours along k that share a scale."""
        return math.prod(self.in_shape) // self.scales.shape[-1]

    @property
    def rows(self) -> "Int4Weight":
        """The weight in this layout."""
        return self

    def tiled(self) -> "TiledInt4Weight | Int4Weight":
        """The weight as the Hopper matmul streams it, or as it is if that kernel does not take it."""
        n = math.prod(self.out_shape)
        if self.activations != "fp8" or not can_tile(n, self.group_size):
            return self
        return TiledInt4Weight(
            to_tiles(self.codes, self.scales), self.tensor_scale, self.out_shape, self.in_shape, self.group_size,
            self.scales.dtype.name, self.numerics,
        )  # fmt: skip

    def validate(self, name: str = "weight") -> None:
        """Checks that the parts belong together.

        Raises:
          ValueError: a shape or dtype is not what the others ask for, or a scale is zero, NaN or infinite; the
            message names ``name``.
        """
        n, k = math.prod(self.out_shape), math.prod(self.in_shape)
        if self.codes.shape != (n, k // 2) or self.codes.dtype != jnp.uint8 or k % 2:
            raise ValueError(
                f"{name}: codes of {self.shape} must be uint8 {(n, k // 2)}, got {self.codes.dtype} {self.codes.shape}"
            )
        if self.scales.ndim != 2 or self.scales.shape[0] != n or k % max(self.scales.shape[1], 1):
            raise ValueError(f"{name}: scales must be [{n}, {k} / group_size], got {self.scales.shape}")
        if self.scales.dtype not in (jnp.float8_e4m3fn, jnp.bfloat16):
            raise ValueError(f"{name}: scales must be float8_e4m3fn or bfloat16, got {self.scales.dtype}")
        if self.tensor_scale.shape != () or self.tensor_scale.dtype != jnp.float32:
            raise ValueError(
                f"{name}: tensor_scale must be a float32 scalar, "
                f"got {self.tensor_scale.dtype} {self.tensor_scale.shape}"
            )
        scales = self.scales.astype(jnp.float32) * self.tensor_scale
        if not bool(jnp.all(jnp.isfinite(scales) & (scales != 0))):
            raise ValueError(f"{name}: a scale is zero, NaN or infinite")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tiles", "tensor_scale"],
    meta_fields=["out_shape", "in_shape", "group_size", "scale_dtype", "numerics"],
)
@dataclass(frozen=True)
class TiledInt4Weight(_Int4):
    """An :class:`Int4Weight` with e4m3 activations, as the Hopper matmul streams it.

    Attributes:
      tiles: int32, codes and scales (:func:`pallas_kernels.to_tiles`).
      tensor_scale: scalar float32.
      out_shape: logical output axes.
      in_shape: logical input axes.
      group_size: neighbours along k that share a scale.
      scale_dtype: of the scales in ``tiles``, "float8_e4m3fn" or "bfloat16".
      numerics: as there.
    """

    tiles: jax.Array
    tensor_scale: jax.Array
    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    group_size: int
    scale_dtype: str
    numerics: Numerics = "exact"

    @property
    def rows(self) -> Int4Weight:
        """The weight with its codes in rows, bit for bit the one this was made from."""
        n, k = math.prod(self.out_shape), math.prod(self.in_shape)
        codes, scales = from_tiles(self.tiles, n, k, self.group_size, jnp.dtype(self.scale_dtype))
        return Int4Weight(codes, scales, self.tensor_scale, self.out_shape, self.in_shape, self.numerics)


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=["out_shape", "in_shape"])
@dataclass(frozen=True)
class ByteWeight(_Rounded):
    """A linear weight ``W[n, k] ≈ codes · scales`` of a byte per element, whose input is not rounded (W8A16).

    Attributes:
      codes: ``[n, k]`` int8 of -127 to 127, or e4m3.
      scales: ``[n]`` float32, positive: the largest magnitude of an output's weights over the largest code.
      out_shape: logical output axes, of which n is the product.
      in_shape: logical input axes, of which k is the product.
    """

    codes: jax.Array
    scales: jax.Array
    out_shape: tuple[int, ...]
    in_shape: tuple[int, ...]

    def dequantize(self, dtype: Any = jnp.float32) -> jax.Array:
        """The weight as an array of ``shape``; exact in float32 up to its rounding, rounded otherwise."""
        w = self.codes.astype(jnp.float32) * self.scales[:, None]
        return w.reshape(self.shape).astype(dtype)

    def validate(self, name: str = "weight") -> None:
        """Checks that the parts belong together.

        Raises:
          ValueError: a shape or dtype is not what the others ask for, a code is NaN, or a scale is not positive and
            finite; the message names ``name``.
        """
        n, k = math.prod(self.out_shape), math.prod(self.in_shape)
        if self.codes.shape != (n, k) or self.codes.dtype not in (jnp.int8, jnp.float8_e4m3fn):
            raise ValueError(
                f"{name}: codes must be int8 or float8_e4m3fn {(n, k)}, got {self.codes.dtype} {self.codes.shape}"
            )
        if self.scales.shape != (n,) or self.scales.dtype != jnp.float32:
            raise ValueError(f"{name}: scales must be float32 {(n,)}, got {self.scales.dtype} {self.scales.shape}")
        is_nan = jnp.isnan(self.codes) if self.codes.dtype == jnp.float8_e4m3fn else False
        if not bool(jnp.all(jnp.isfinite(self.scales) & (self.scales > 0)) & ~jnp.any(is_nan)):
            raise ValueError(f"{name}: a scale is not positive and finite, or a code is NaN")


def takes_fp8(leaf: object) -> bool:
    """Whether ``leaf`` is an int4 weight whose product takes e4m3 activations."""
    return isinstance(leaf, TiledInt4Weight) or (isinstance(leaf, Int4Weight) and leaf.activations == "fp8")


def is_int4(leaf: object) -> bool:
    """Whether ``leaf`` is an int4 weight of any layout; for ``is_leaf`` in ``jax.tree.map``."""
    return isinstance(leaf, _Int4)


def to_layout(params: Any, layout: Layout) -> Any:
    """A pytree with its int4 weights in another layout; what they stand for stays the same, bit for bit.

    Args:
      params: any pytree; leaves that are no int4 weights are passed on.
      layout: "rows"; "tiles", for the Hopper matmul, where it takes the weight; or "auto", which is "tiles" if the
        default device is such a GPU.

    Raises:
      ValueError: there is no such layout.
    """
    if layout not in ("rows", "tiles", "auto"):
        raise ValueError(f"{layout=} must be 'rows', 'tiles' or 'auto'")
    tiles = layout == "tiles" or (layout == "auto" and has_hopper_gpu())

    def change(leaf: Any) -> Any:
        if not is_int4(leaf):
            return leaf
        if tiles:
            return leaf if isinstance(leaf, TiledInt4Weight) else _tiled(leaf)
        return _rows(leaf)

    return jax.tree.map(change, params, is_leaf=is_int4)


@jax.jit
def _tiled(weight: Int4Weight) -> Int4Weight | TiledInt4Weight:
    return weight.tiled()


@jax.jit
def _rows(weight: Int4Weight | TiledInt4Weight) -> Int4Weight:
    return weight.rows

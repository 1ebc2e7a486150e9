"""How int4 codes lie in memory: two per byte, the element with the even index in the low nibble.

XLA stores ``jnp.int4`` arrays the same way on a device, yet reports a byte per element on the host and
cannot save them; ``uint8`` holds exactly the bytes that are meant, everywhere.
"""

import jax
import jax.numpy as jnp

INT4_MIN = -8
INT4_MAX = 7


def pack_int4(codes: jax.Array) -> jax.Array:
    """Packs int4 values two to a byte along the last axis.

    Args:
      codes: ``[..., k]`` int8 (or wider) with values in [-8, 7]; k even.

    Returns:
      ``[..., k / 2]`` uint8. Byte j holds element 2j in its low and element 2j + 1 in its high nibble, both in
      two's complement.

    Raises:
      ValueError: k is odd.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"int4 codes are packed in pairs, so the last axis must be even; got {codes.shape=}")
    nibbles = codes.astype(jnp.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: jax.Array) -> jax.Array:
    """Inverse of :func:`pack_int4`: ``[..., k / 2]`` uint8 to ``[..., k]`` int8 in [-8, 7]."""
    signed = packed.astype(jnp.int8)
    low = jnp.left_shift(signed, 4) >> 4  # the arithmetic shift carries the nibble's sign
    high = signed >> 4
    return jnp.stack([low, high], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])

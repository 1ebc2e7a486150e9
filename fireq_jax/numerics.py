"""Rounding a weight matrix to int4 codes with group scales."""

from typing import Literal

import jax
import jax.numpy as jnp

from fireq_jax.config import Recipe
from pallas_kernels import E4M3_MAX, INT4_MAX, INT4_MIN, pack_int4, round_to_bf16, round_to_e4m3

# Smallest positive (subnormal) e4m3 value: no stored scale is smaller, since a kernel may divide by it.
E4M3_TINY = 2.0**-9
INT8_MAX = 127  # and as much below zero
# Range of exponents that FireQ's published rule tries.
FIREQ_MAX_EXPONENT = 14


def largest_divisor(n: int, most: int) -> int:
    """The largest number up to ``most``, at least 1, that divides n."""
    return next(size for size in range(min(n, most), 0, -1) if n % size == 0)


def to_grid(w: jax.Array, step: jax.Array) -> jax.Array:
    """The int4 code, as a float, whose multiple of ``step`` is nearest to w."""
    return jnp.clip(jnp.round(w / step), INT4_MIN, INT4_MAX)


def group_absmax(w: jax.Array, group_size: int) -> jax.Array:
    """``[n, k]`` -> ``[n, k / group_size]`` float32, the largest magnitude of each group."""
    return jnp.max(jnp.abs(w.astype(jnp.float32)).reshape(w.shape[0], -1, group_size), axis=-1)


def tensor_scale_exponent(
    group_scales: jax.Array, rule: Literal["largest", "fireq", "none"], largest_stored: float
) -> jax.Array:
    """Exponent e such that ``group_scales · 2^e`` suits e4m3; see :class:`fireq_jax.config.Recipe`.

    Args:
      group_scales: positive float32 of any shape, 0 for groups of zeros, which have no say.
      rule: "largest", "fireq" or "none".
      largest_stored: the largest value a stored scale may take.

    Returns:
      scalar int32.
    """
    if rule == "none":
        return jnp.int32(0)
    largest = jnp.max(group_scales)
    fits = jnp.floor(jnp.log2(largest_stored / jnp.where(largest > 0, largest, largest_stored)))
    if rule == "fireq":
        smallest = jnp.min(jnp.where(group_scales > 0, group_scales, jnp.inf))
        needed = jnp.ceil(jnp.log2(E4M3_TINY / smallest))  # -inf if there is no such group
        fits = jnp.clip(jnp.minimum(needed, fits), 0, FIREQ_MAX_EXPONENT)
    # A float32 power of two has exponents of -126 to 127, and both 2^e and 2^-e are needed.
    return jnp.clip(fits, -126, 126).astype(jnp.int32)


def store_scales(group_scales: jax.Array, recipe: Recipe) -> tuple[jax.Array, jax.Array]:
    """Rounds ideal group scales to the recipe's storage type.

    Args:
      group_scales: ``[n, k / g]`` float32, positive; 0 for groups of zeros.
      recipe: its ``scales``, ``tensor_scale`` and ``numerics`` count.

    Returns:
      Scales in e4m3 or bf16 and the scalar float32 ``tensor_scale``: ``group_scales ≈ scales · tensor_scale``. All
      stored scales are positive; a group of zeros takes the largest scale of the weight.
    """
    largest = jnp.max(group_scales)
    group_scales = jnp.where(group_scales > 0, group_scales, jnp.where(largest > 0, largest, 1.0))
    if recipe.scales == "sigma_bf16":
        tiny = float(jnp.finfo(jnp.bfloat16).tiny)
        return round_to_bf16(jnp.maximum(group_scales, tiny)).astype(jnp.bfloat16), jnp.float32(1.0)
    # The folded product stores e4m3(code · scale), so there the code needs room, too.
    largest_stored = E4M3_MAX / -INT4_MIN if recipe.numerics == "folded" else E4M3_MAX
    exponent = tensor_scale_exponent(group_scales, recipe.tensor_scale, largest_stored)
    stored = round_to_e4m3(jnp.maximum(jnp.ldexp(group_scales, exponent), E4M3_TINY))
    return stored, jnp.ldexp(jnp.float32(1.0), -exponent)


def round_to_bytes(w: jax.Array, kind: Literal["fp8", "int8"]) -> tuple[jax.Array, jax.Array]:
    """Rounds a weight to the nearest codes of a byte, with a scale per output: ``w ≈ codes · scales``.

    Args:
      w: ``[n, k]`` float.
      kind: "int8", whose steps are equal, or "fp8", e4m3, whose steps are up to an eighth of a weight. In a row of
        normal numbers without outliers int8 loses a third of what e4m3 does.

    Returns:
      codes ``[n, k]`` int8 or e4m3, and scales ``[n]`` float32, 1 for outputs whose weights are all zero.
    """
    wide = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=1)
    limit = E4M3_MAX if kind == "fp8" else INT8_MAX
    # A subnormal number has no reciprocal to rely on.
    scales = jnp.where(largest > limit * jnp.finfo(jnp.float32).tiny, largest / limit, 1.0)
    scaled = wide / scales[:, None]
    if kind == "fp8":
        return round_to_e4m3(scaled), scales
    return jnp.clip(jnp.round(scaled), -INT8_MAX, INT8_MAX).astype(jnp.int8), scales


def round_weight(w: jax.Array, group_size: int, recipe: Recipe) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rounds a weight to the nearest point of its int4 grid: ``w ≈ codes · scales · tensor_scale``.

    Scales are rounded to their storage type first and codes are taken with the rounded ones.

    Args:
      w: ``[n, k]`` float.
      group_size: divides k.
      recipe: its ``scales``, ``tensor_scale`` and ``numerics`` count.

    Returns:
      codes ``[n, k / 2]`` uint8 (packed), scales ``[n, k / group_size]`` e4m3 or bf16, tensor_scale float32 scalar.
    """
    scales, tensor_scale = store_scales(group_absmax(w, group_size) / INT4_MAX, recipe)
    step = scales.astype(jnp.float32) * tensor_scale
    grouped = w.astype(jnp.float32).reshape(*scales.shape, group_size)
    codes = to_grid(grouped, step[..., None])
    return pack_int4(codes.astype(jnp.int8).reshape(w.shape)), scales, tensor_scale

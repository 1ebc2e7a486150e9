"""The specification: every operation of the quantised model in plain ``jnp``, for any shape and any device.

Roundings and products are here, what comes before attention in :mod:`pallas_kernels.reference_rotation`, attention in
:mod:`pallas_kernels.reference_attention`.

A kernel is right when it agrees with the function of the same name here. Notation: b sequences, t new tokens,
s cache slots, h query heads, kv key/value heads (query head i reads kv head ``i // (h / kv)``), d head_dim,
m tokens, n outputs, k inputs, g scale group. "e4m3" is ``float8_e4m3fn``: no infinities, largest value 448.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.packing import unpack_int4
from pallas_kernels.weight_layout import from_tiles

E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0
Numerics = Literal["exact", "folded"]


def round_to_e4m3(x: jax.Array) -> jax.Array:
    """Rounds to the nearest e4m3 value, saturating at ±448 (a plain cast gives NaN there).

    Behind a barrier: XLA may otherwise drop the rounding where the result is widened again (seen on an H100).
    """
    return jax.lax.optimization_barrier(jnp.clip(x.astype(jnp.float32), -E4M3_MAX, E4M3_MAX).astype(E4M3))


def round_to_bf16(x: jax.Array) -> jax.Array:
    """Rounds float32 to the nearest bf16 value and keeps it in float32.

    A pair of casts says the same, but XLA may drop it as it may drop that of :func:`round_to_e4m3`.
    """
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def absmax_scale(absmax: jax.Array, largest: float) -> jax.Array:
    """``absmax / largest``, or 1 where that is zero or too small to divide by."""
    scale = absmax / largest
    return jnp.where(scale >= jnp.finfo(jnp.float32).tiny, scale, 1.0)


def quantize_fp8(
    x: jax.Array, axis: int | tuple[int, ...] = -1, largest: float = E4M3_MAX
) -> tuple[jax.Array, jax.Array]:
    """Rounds to e4m3 with one dynamic scale per slice along ``axis``: ``x ≈ x8 · scale``.

    Args:
      x: float array; NaN in a slice makes that slice NaN.
      axis: the axis or axes that share a scale.
      largest: that a slice's magnitudes are scaled to at most.

    Returns:
      ``x8`` e4m3 of the shape of ``x``, and the scale ``max|x| / largest`` in float32 with ``axis`` removed; the
      scale of an all-zero slice is 1.
    """
    x = x.astype(jnp.float32)
    scale = absmax_scale(jnp.max(jnp.abs(x), axis=axis, keepdims=True), largest)
    return round_to_e4m3(x / scale), jnp.squeeze(scale, axis)


def norm_quantize(x: jax.Array, gain: jax.Array, *, eps: float) -> tuple[jax.Array, jax.Array]:
    """The RMS norm in e4m3.

    Args:
      x: ``[m, k]`` float.
      gain: ``[k]`` float.
      eps: added to the mean of the squares.

    Returns:
      ``x / sqrt(mean(x²) + eps) · gain``, computed in float32 and rounded to x's dtype, as ``[m, k]`` e4m3 and ``[m]``
      float32 scales, like :func:`quantize_fp8`.
    """
    values = x.astype(jnp.float32)
    values = values * jax.lax.rsqrt(jnp.mean(jnp.square(values), axis=-1, keepdims=True) + eps)
    return quantize_fp8((values * gain.astype(jnp.float32)).astype(x.dtype))


def gate_quantize(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``silu(gate) · up`` in e4m3.

    Args:
      gate: ``[m, k]`` float.
      up: ``[m, k]`` of the same dtype.

    Returns:
      ``[m, k]`` e4m3 and ``[m]`` float32 scales, like :func:`quantize_fp8`.
    """
    return quantize_fp8(jax.nn.silu(gate) * up)


def dequantize_int4(codes: jax.Array, scales: jax.Array, tensor_scale: jax.Array | float = 1.0) -> jax.Array:
    """``codes · scales · tensor_scale`` in float32, which is exact: 4-bit times at most 8-bit significands.

    Args:
      codes: ``[..., k / 2]`` uint8, packed int4.
      scales: ``[..., k / g]`` e4m3, bf16 or f32: one scale per g neighbours along k.
      tensor_scale: one float for the whole array.

    Returns:
      ``[..., k]`` float32.
    """
    values = unpack_int4(codes).astype(jnp.float32)
    grouped = values.reshape(*scales.shape, values.shape[-1] // scales.shape[-1])
    return (grouped * (scales.astype(jnp.float32) * tensor_scale)[..., None]).reshape(values.shape)


def int4_fp8_matmul(
    x8: jax.Array,
    x_scale: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    tensor_scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    numerics: Numerics = "exact",
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> jax.Array:
    """``y[m, n] = x_scale[m] · Σ_k x8[m, k] · W[n, k] + bias[n]``, sums in float32, group after group.

    Sums inside a group are exact in float32 unless they pass 2^15 (e4m3 values are multiples of 2^-9), so their order
    does not matter and a token's result does not depend on which other tokens are in the batch. That is worth the
    loop: a single e4m3 rounding that flips in an early layer moves the logits by as much as the quantisation itself.

    Args:
      x8: ``[m, k]`` e4m3.
      x_scale: ``[m]`` float32.
      codes: ``[n, k / 2]`` uint8, packed int4.
      scales: ``[n, k / g]`` e4m3 or bf16.
      tensor_scale: scalar float32.
      bias: ``[n]`` or None.
      numerics: "exact" is ``W = codes · scales · tensor_scale``, the group scale applied in float32: an int4 code
        is exact in e4m3, so weights are rounded once. "folded" is ``W = e4m3(codes · scales) · tensor_scale``,
        FireQ's table look-up (arXiv 2505.20839, section 3.1): a second rounding of about 2 to 3 %, for one less
        multiplication per group.
      out_dtype: dtype of y.

    Returns:
      ``[m, n]`` ``out_dtype``.
    """
    m, k = x8.shape
    n, groups = scales.shape
    size = k // groups

    def add_group(total: jax.Array, group: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, w, scale = group[0], unpack_int4(group[1]).astype(jnp.float32), group[2]
        if numerics == "folded":
            return total + _dot(x, round_to_e4m3(w * scale[:, None]).astype(jnp.float32)), None
        return total + _dot(x, w) * scale, None

    grouped = (
        x8.astype(jnp.float32).reshape(m, groups, size).swapaxes(0, 1),
        codes.reshape(n, groups, size // 2).swapaxes(0, 1),
        scales.astype(jnp.float32).T,
    )
    y, _ = jax.lax.scan(add_group, jnp.zeros((m, n), jnp.float32), grouped)
    y = y * (x_scale[:, None] * tensor_scale)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(out_dtype)


def int4_fp8_matmul_tiled(
    x8: jax.Array,
    x_scale: jax.Array,
    tiles: jax.Array,
    tensor_scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    n: int,
    group_size: int,
    scale_dtype: jnp.dtype,
    numerics: Numerics = "exact",
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> jax.Array:
    """:func:`int4_fp8_matmul` of a weight in the layout of :mod:`pallas_kernels.weight_layout`."""
    codes, scales = from_tiles(tiles, n, x8.shape[1], group_size, scale_dtype)
    return int4_fp8_matmul(x8, x_scale, codes, scales, tensor_scale, bias, numerics=numerics, out_dtype=out_dtype)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """``x · wᵀ`` of float32 matrices."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)

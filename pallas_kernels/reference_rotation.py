"""The specification of what comes between the projections and attention, as :mod:`pallas_kernels.reference`."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.packing import INT4_MAX, INT4_MIN, pack_int4
from pallas_kernels.reference import E4M3_MAX, absmax_scale, quantize_fp8, round_to_bf16, round_to_e4m3

# Of a prompt's queries and keys in e4m3: a score, the sum of 128 products, is at most 50176, a float16. Queries keep
# their relative precision down to 1/1792 of a head's largest magnitude, keys down to 1/448 of a block's at least.
QUERY_MAX, KEY_MAX = 28.0, 14.0
# Codes and scales of keys, codes and scales of values, as attention to the cache takes them.
Cache = tuple[jax.Array, jax.Array, jax.Array, jax.Array]
# Tokens of a prompt whose e4m3 keys, or values, of a head share a scale: a block of the prefill kernel.
SCALE_TOKENS = 128
MANTISSA = 2**23 - 1  # the bits of a float32's mantissa


def quantize_kv(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds keys or values to int4 with one scale per token and head: ``x ≈ codes · scale``.

    The entry of largest magnitude takes code -8, whatever its sign, so the scale carries a sign and steps are an eighth
    finer than with ``max|x| / 7``. An entry of the opposite sign beyond 7/8 of it is clipped, by at most one step. The
    scale is rounded to bf16 first and codes are taken with the rounded scale, so nothing is lost twice.

    Args:
      x: ``[..., d]`` float.

    Returns:
      codes ``[..., d / 2]`` uint8 (packed) and scale ``[...]`` bf16, minus the entry of largest magnitude over 8; 1 for
      an all-zero row.
    """
    x = x.astype(jnp.float32)
    highest, lowest = jnp.max(x, axis=-1), jnp.min(x, axis=-1)
    magnitude = absmax_scale(jnp.maximum(highest, -lowest), -INT4_MIN)
    scale = round_to_bf16(jnp.where(highest > -lowest, -magnitude, magnitude))
    codes = jnp.clip(jnp.round(x / scale[..., None]), INT4_MIN, INT4_MAX)
    return pack_int4(codes.astype(jnp.int8)), scale.astype(jnp.bfloat16)


def write_rows(cache: jax.Array, rows: jax.Array, starts: jax.Array, lengths: jax.Array) -> jax.Array:
    """Writes each sequence's new rows behind the ones its cache already holds.

    Args:
      cache: ``[b, kv, s, ...]``.
      rows: ``[b, t, kv, ...]``, of the cache's dtype.
      starts: ``[b]`` int32, rows that sequence already has.
      lengths: ``[b]`` int32, how many of the t rows are real; the padding behind them is not written.

    Returns:
      The cache with ``cache[i, :, starts[i] + j] = rows[i, j]`` for ``j < lengths[i]``; rows that would fall
      behind slot s - 1 are dropped.
    """
    b, t = rows.shape[:2]
    new = jnp.arange(t)
    slots = jnp.where(new < lengths[:, None], starts[:, None] + new, cache.shape[2])
    return cache.at[jnp.arange(b)[:, None], :, slots].set(rows, mode="drop")


def append_int4(
    cache: Cache,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
) -> Cache:
    """Rounds new keys and values with :func:`quantize_kv` and writes them with :func:`write_rows`.

    Args:
      cache: ``(k_codes, k_scales, v_codes, v_scales)`` as in :func:`pallas_kernels.decode_attention`.
      k: ``[b, t, kv, d]`` float, already rotated.
      v: ``[b, t, kv, d]`` float.
      starts: ``[b]`` int32, tokens each sequence already has.
      lengths: ``[b]`` int32, how many of the t tokens are real; the others are not written.

    Returns:
      The cache.
    """
    rows = (*quantize_kv(k), *quantize_kv(v))
    k_codes, k_scales, v_codes, v_scales = (
        write_rows(old, new, starts, lengths) for old, new in zip(cache, rows, strict=True)
    )
    return k_codes, k_scales, v_codes, v_scales


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array, scale: jax.Array | None = None) -> jax.Array:
    """Rotates the channel pairs (i, i + d/2) of every head, then scales the channels.

    Args:
      x: ``[batch, t, heads, d]``.
      cos: ``[batch, t, 1, d / 2]`` float32.
      sin: as cos.
      scale: ``[heads, d]`` float32, or None; it multiplies the tables, so that it costs nothing per element.

    Returns:
      ``[batch, t, heads, d]`` float32.
    """
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    if scale is None:
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    scale_low, scale_high = jnp.split(scale, 2, axis=-1)
    rotated_low = low * (cos * scale_low) - high * (sin * scale_low)
    rotated_high = high * (cos * scale_high) + low * (sin * scale_high)
    return jnp.concatenate([rotated_low, rotated_high], axis=-1)


def apply_ropes(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    scale: jax.Array | None,
    key_offset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """:func:`apply_rope` of queries, multiplied by their kv head's row of ``scale``, and of keys, divided by it.

    Where there is a ``key_offset``, it is subtracted from the keys, and the channels of both are mixed.
    """
    if scale is None:
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    else:
        group = q.shape[2] // k.shape[2]
        q, k = apply_rope(q, cos, sin, jnp.repeat(scale, group, axis=0)), apply_rope(k, cos, sin, 1 / scale)
    return (q, k) if key_offset is None else (mix_channels(q), mix_channels(k - key_offset))


def mix_channels(x: jax.Array) -> jax.Array:
    """``[..., d]`` float32 times :func:`hadamard`'s matrix."""
    return jnp.matmul(x, jnp.asarray(hadamard(x.shape[-1])), precision=jax.lax.Precision.HIGHEST)


def rotate_and_append(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: Cache,
    starts: jax.Array,
    lengths: jax.Array,
    *,
    scale: jax.Array | None = None,
    key_offset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Cache]:
    """Makes e4m3 queries, and writes int4 keys and values to the cache.

    Args:
      q: ``[b, t, h, d]`` float.
      k: ``[b, t, kv, d]`` float.
      v: ``[b, t, kv, d]`` float.
      cos: ``[b, t, 1, d / 2]`` float32, of the angles by which channels i and i + d / 2 are rotated; or ``[1, t, ...]``
        for all sequences.
      sin: as cos.
      cache: ``(k_codes, k_scales, v_codes, v_scales)`` as in :func:`pallas_kernels.decode_attention`.
      starts: ``[b]`` int32, tokens each sequence already has.
      lengths: ``[b]`` int32, how many of the t tokens are real; the others are not written.
      scale: ``[kv, d]`` float32, or None; rotated keys are divided by it, queries of that kv head multiplied.
      key_offset: ``[kv, d]`` float32 that is subtracted from keys behind that, before :func:`mix_channels` is applied
        to queries and keys; neither is done if this is None.

    Returns:
      ``[b, t, h, d]`` e4m3 and ``[b, t, h]`` float32 as from :func:`quantize_fp8` up to ``QUERY_MAX``, and the cache.
    """
    q, k = apply_ropes(q, k, cos, sin, scale, key_offset)
    return *quantize_fp8(q, largest=QUERY_MAX), append_int4(cache, k, v, starts, lengths)


def quantize_blocks(x: jax.Array, largest: float = KEY_MAX) -> tuple[jax.Array, jax.Array]:
    """A prompt's keys or values in e4m3, with a scale per head and block of ``SCALE_TOKENS`` tokens.

    Scales are those of :func:`quantize_fp8`, rounded up to powers of two: e4m3 keeps its relative precision, and blocks
    whose largest values are alike share a unit, so that sums over them need not be converted.

    Args:
      x: ``[b, t, kv, d]`` float.
      largest: that a block's magnitudes are scaled to at most. ``KEY_MAX`` is what
        :func:`pallas_kernels.prefill_attention` needs of keys; values may take all of ``E4M3_MAX``.

    Returns:
      ``[b, t, kv, d]`` e4m3 and ``[b, kv, ceil(t / SCALE_TOKENS)]`` float32.
    """
    b, t, kv, d = x.shape
    blocks = jnp.pad(x, ((0, 0), (0, -t % SCALE_TOKENS), (0, 0), (0, 0))).reshape(b, -1, SCALE_TOKENS, kv, d)
    blocks = blocks.astype(jnp.float32)
    scale = absmax_scale(jnp.max(jnp.abs(blocks), axis=(2, 4), keepdims=True), largest)
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    above = jax.lax.bitcast_convert_type((bits + MANTISSA) & ~MANTISSA, jnp.float32)
    scale = jnp.where(jnp.isnan(scale), scale, above)
    return round_to_e4m3(blocks / scale).reshape(b, -1, kv, d)[:, :t], scale[:, :, 0, :, 0].swapaxes(1, 2)


def expand_blocks(scale: jax.Array, t: int) -> jax.Array:
    """``[b, kv, blocks]`` to ``[b, t, kv, 1]``."""
    return jnp.repeat(scale, SCALE_TOKENS, axis=2)[:, :, :t].swapaxes(1, 2)[..., None]


def transpose_values(v8: jax.Array) -> jax.Array:
    """``[b, t, kv, d]`` to ``[b, kv, d, t']``, where t' is t up to the next multiple of ``SCALE_TOKENS``, zeros there.

    Of each 16 tokens, 8 h + 2 i + e comes to place 4 i + 2 h + e: the order in which the tensor core's registers of the
    scores, rounded, are those of the second product's operand.
    """
    b, t, kv, d = v8.shape
    padded = jnp.pad(v8, ((0, 0), (0, -t % SCALE_TOKENS), (0, 0), (0, 0)))
    return padded.reshape(b, -1, 2, 4, 2, kv, d).transpose(0, 5, 6, 1, 3, 2, 4).reshape(b, kv, d, -1)


def restore_values(transposed: jax.Array, t: int) -> jax.Array:
    """``[b, t, kv, d]`` from what :func:`transpose_values` makes of it."""
    b, kv, d, _ = transposed.shape
    split = transposed.reshape(b, kv, d, -1, 4, 2, 2).transpose(0, 3, 5, 4, 6, 1, 2)
    return split.reshape(b, -1, kv, d)[:, :t]


def rotate_and_round(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: Cache,
    starts: jax.Array,
    lengths: jax.Array,
    *,
    scale: jax.Array | None = None,
    key_offset: jax.Array | None = None,
) -> tuple[tuple[jax.Array, ...], Cache]:
    """:func:`rotate_and_append`, and the e4m3 keys and values of a prompt's own attention.

    Arguments are those of :func:`rotate_and_append`. Keys and values are rounded twice, each time from full precision.

    Returns:
      ``(q8, q_scale, k8, k_scale, v8, v_scale)`` as :func:`pallas_kernels.prefill_attention` takes them, zeros behind
      the real tokens' keys and values; and the cache.
    """
    q, k = apply_ropes(q, k, cos, sin, scale, key_offset)
    # The scales of a block must not depend on the padding behind it.
    real = (jnp.arange(q.shape[1]) < lengths[:, None])[..., None, None]
    k8, k_scale = quantize_blocks(jnp.where(real, k, 0))
    v8, v_scale = quantize_blocks(jnp.where(real, v, 0), E4M3_MAX)
    prompt = (*quantize_fp8(q, largest=QUERY_MAX), k8, k_scale, transpose_values(v8), v_scale)
    return prompt, append_int4(cache, k, v, starts, lengths)


def hadamard(d: int) -> np.ndarray:
    """An orthonormal ``[d, d]`` float32 matrix whose entries have equal magnitude in blocks as large as d allows.

    Sylvester's construction for the largest power of two that divides d, repeated along the diagonal.
    """
    matrix = np.ones((1, 1))
    while d % (2 * len(matrix)) == 0:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    blocks = d // len(matrix)
    return (np.kron(np.eye(blocks), matrix) / np.sqrt(len(matrix))).astype(np.float32)

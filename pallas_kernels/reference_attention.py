"""The specification of attention, as :mod:`pallas_kernels.reference`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.packing import unpack_int4
from pallas_kernels.reference import dequantize_int4, round_to_bf16, round_to_e4m3
from pallas_kernels.reference_rotation import Cache, expand_blocks, restore_values

# Probabilities are in [0, 1], where e4m3 has few values left; times 256 they use its normal range.
PROBABILITY_SCALE = 256.0
# Rows of scores are independent, so long prompts are attended in blocks of this many queries: the score matrix
# stays small and every number stays the same.
QUERY_BLOCK = 512
# Sums over keys run block after block, so that keys which are masked or not there at all, however many, leave every
# bit of the result as it is: a prompt gives the same in a longer cache or beside longer prompts.
KEY_BLOCK = 64


def _attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    softmax_scale: float,
    weigh: Callable[[jax.Array, jax.Array], jax.Array],
    v_scales: jax.Array,
) -> jax.Array:
    """Softmax attention in float32 over blocks of ``KEY_BLOCK`` keys.

    Args:
      q: ``[b, t, h, d]`` float32.
      k: ``[b, s, kv, d]`` float32; s is a multiple of ``KEY_BLOCK``.
      v: as k.
      visible: ``[b, t, s]`` bool.
      softmax_scale: factor of the scores.
      weigh: rounds ``exp(score - max)``, ``[b, kv, h / kv, t, KEY_BLOCK]``, given that block's ``v_scales``.
      v_scales: ``[b, s, kv]`` float32.

    Returns:
      ``[b, t, h, d]`` float32; zeros for a query that sees nothing.
    """
    b, t, h, d = q.shape
    kv = k.shape[2]
    highest = jax.lax.Precision.HIGHEST
    queries = q.reshape(b, t, kv, h // kv, d)

    def blocks(x: jax.Array, axis: int) -> jax.Array:
        shape = (*x.shape[:axis], -1, KEY_BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    def score(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        scores = jnp.einsum("btkgd,bskd->bkgts", queries, block[0], precision=highest) * softmax_scale
        return jnp.where(block[1][:, None, None], scores, -jnp.inf)

    scores = jax.lax.map(score, (blocks(k, 1), blocks(visible, 2)))
    largest = jnp.max(scores, axis=(0, -1))[..., None]
    largest = jnp.where(jnp.isfinite(largest), largest, 0.0)

    def add_block(
        sums: tuple[jax.Array, jax.Array], block: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        p = jnp.exp(block[0] - largest)
        weights = weigh(p, block[2].swapaxes(1, 2)[:, :, None, None])
        weighted = jnp.einsum("bkgts,bskd->bkgtd", weights, block[1], precision=highest)
        return (sums[0] + weighted, sums[1] + jnp.sum(p, axis=-1, keepdims=True)), None

    zeros = jnp.zeros((b, kv, h // kv, t, d), jnp.float32), jnp.zeros((b, kv, h // kv, t, 1), jnp.float32)
    (out, total), _ = jax.lax.scan(add_block, zeros, (scores, blocks(v, 1), blocks(v_scales, 1)))
    out = out / jnp.where(total > 0, total, 1.0)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, h, d)


def _pad_keys(x: jax.Array, axis: int) -> jax.Array:
    """Zeros behind ``axis`` up to the next multiple of ``KEY_BLOCK``."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % KEY_BLOCK)
    return jnp.pad(x, padding)


def _in_query_blocks(attend: Callable[..., jax.Array], *per_query: jax.Array) -> jax.Array:
    """Applies ``attend`` to blocks of ``QUERY_BLOCK`` queries along axis 1 of each array of ``per_query``."""
    t = per_query[0].shape[1]
    if t <= QUERY_BLOCK:
        return attend(*per_query)
    blocks = -(-t // QUERY_BLOCK)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, blocks * QUERY_BLOCK - t)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    out = jax.lax.map(lambda args: attend(*args), tuple(split(x) for x in per_query))
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :t]


def prefill_attention(
    q8: jax.Array,
    q_scale: jax.Array,
    k8: jax.Array,
    k_scale: jax.Array,
    v8: jax.Array,
    v_scale: jax.Array,
    lengths: jax.Array,
    prefix: Cache | None = None,
    prefix_lengths: jax.Array | None = None,
    *,
    softmax_scale: float,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> jax.Array:
    """Causal attention of t new tokens to each other, in e4m3, and to an int4 prefix if there is one.

    The new tokens' keys and values are rounded from the model's dtype straight to e4m3. The weights
    ``exp(score - max)`` enter the second product as ``e4m3(256 · weight)``; their sum is taken in float32 before
    that rounding.

    Args:
      q8: ``[b, t, h, d]`` e4m3, already rotated, up to ``QUERY_MAX``.
      q_scale: ``[b, t, h]`` float32.
      k8: ``[b, t, kv, d]`` e4m3, up to ``KEY_MAX``.
      k_scale: ``[b, kv, ceil(t / SCALE_TOKENS)]`` float32.
      v8: ``[b, kv, d, t']`` e4m3, from :func:`pallas_kernels.transpose_values`.
      v_scale: as k_scale.
      lengths: ``[b]`` int32, how many of the t tokens are real.
      prefix: cached ``(k_codes, k_scales, v_codes, v_scales)`` as in :func:`decode_attention`; all new tokens see
        the first ``prefix_lengths[i]`` slots.
      prefix_lengths: ``[b]`` int32; given exactly when ``prefix`` is.
      softmax_scale: usually ``d ** -0.5``.
      out_dtype: dtype of the result.

    Returns:
      ``[b, t, h, d]`` ``out_dtype``. Rows at and behind ``lengths[i]`` are finite and mean nothing.
    """
    b, t = q8.shape[:2]
    k = _pad_keys(k8.astype(jnp.float32) * expand_blocks(k_scale, t), 1)
    v = _pad_keys(restore_values(v8, t).astype(jnp.float32) * expand_blocks(v_scale, t), 1)
    # A new token sees new tokens up to itself. The key's index is compared with the query's, prefix keys get
    # index -1 where they are valid, and t (never visible) where they are not.
    fresh = jnp.arange(k.shape[1])
    key_index = jnp.where(fresh < lengths[:, None], fresh, t)
    if prefix is not None:
        if prefix_lengths is None:
            raise ValueError("prefix was given without prefix_lengths")
        k_codes, k_scales, v_codes, v_scales = prefix
        k_old = _pad_keys(dequantize_int4(k_codes, k_scales[..., None]).transpose(0, 2, 1, 3), 1)
        v_old = _pad_keys(dequantize_int4(v_codes, v_scales[..., None]).transpose(0, 2, 1, 3), 1)
        k, v = jnp.concatenate([k_old, k], axis=1), jnp.concatenate([v_old, v], axis=1)
        old = jnp.where(jnp.arange(k_old.shape[1]) < prefix_lengths[:, None], -1, t)
        key_index = jnp.concatenate([old, key_index], axis=1)

    def weigh(p: jax.Array, _: jax.Array) -> jax.Array:
        return round_to_e4m3(p * PROBABILITY_SCALE).astype(jnp.float32) / PROBABILITY_SCALE

    def attend(q_block: jax.Array, scale_block: jax.Array, query_index: jax.Array) -> jax.Array:
        q = q_block.astype(jnp.float32) * scale_block[..., None]
        visible = key_index[:, None, :] <= query_index[..., None]
        return _attend(q, k, v, visible, softmax_scale, weigh, jnp.ones(v.shape[:3])).astype(out_dtype)

    return _in_query_blocks(attend, q8, q_scale, jnp.broadcast_to(jnp.arange(t), (b, t)))


def decode_attention(
    q8: jax.Array,
    q_scale: jax.Array,
    k_codes: jax.Array,
    k_scales: jax.Array,
    v_codes: jax.Array,
    v_scales: jax.Array,
    query_positions: jax.Array,
    *,
    softmax_scale: float,
    out_dtype: jnp.dtype = jnp.bfloat16,
) -> jax.Array:
    """Causal attention of a few new tokens to the int4 cache, which already holds their own keys and values.

    ``exp(score - max) · v_scale`` enters the second product rounded to bf16, in which int4 codes are exact. The
    step is bound by memory, so eight more bits per weight cost nothing and need no scaling.

    Args:
      q8: ``[b, t, h, d]`` e4m3, already rotated.
      q_scale: ``[b, t, h]`` float32.
      k_codes: ``[b, kv, s, d / 2]`` uint8, packed int4; slot j holds the token at position j.
      k_scales: ``[b, kv, s]`` bf16; may be negative.
      v_codes: ``[b, kv, s, d / 2]`` uint8.
      v_scales: ``[b, kv, s]`` bf16; may be negative.
      query_positions: ``[b, t]`` int32; a query at position p sees slots 0 to p.
      softmax_scale: usually ``d ** -0.5``.
      out_dtype: dtype of the result.

    Returns:
      ``[b, t, h, d]`` ``out_dtype``.
    """
    k = _pad_keys(dequantize_int4(k_codes, k_scales[..., None]).transpose(0, 2, 1, 3), 1)
    v = _pad_keys(unpack_int4(v_codes).astype(jnp.float32).transpose(0, 2, 1, 3), 1)
    scales = _pad_keys(v_scales.astype(jnp.float32).transpose(0, 2, 1), 1)
    slots = jnp.arange(k.shape[1])

    def weigh(p: jax.Array, v_scale: jax.Array) -> jax.Array:
        return round_to_bf16(p * v_scale)

    def attend(q_block: jax.Array, scale_block: jax.Array, positions: jax.Array) -> jax.Array:
        q = q_block.astype(jnp.float32) * scale_block[..., None]
        visible = slots <= positions[..., None]
        return _attend(q, k, v, visible, softmax_scale, weigh, scales).astype(out_dtype)

    return _in_query_blocks(attend, q8, q_scale, query_positions)

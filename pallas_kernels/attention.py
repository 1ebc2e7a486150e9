"""Attention, and what comes before it: shapes are checked here, then an implementation is chosen."""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import reference_attention, reference_rotation
from pallas_kernels.dispatch import no_hopper, refused, register, require, select
from pallas_kernels.reference_rotation import Cache
from pallas_kernels.tiling import DECODE_ROWS, DECODE_SLOTS

Prompt = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _mosaic_decode(*arrays: jax.Array, **options: Any) -> jax.Array:
    from pallas_kernels import mosaic_decode

    return mosaic_decode.decode_attention(*arrays, **options)


def _mosaic_append(*arrays: Any, **options: Any) -> Any:
    from pallas_kernels import mosaic_append

    (q8, q_scale), cache = mosaic_append.rotate(*arrays, prompt=False, **options)
    return q8, q_scale, cache


def _mosaic_round(*arrays: Any, **options: Any) -> Any:
    from pallas_kernels import mosaic_append

    return mosaic_append.rotate(*arrays, prompt=True, **options)


def _mosaic_prefill(*arrays: Any, out_dtype: Any, **options: Any) -> jax.Array:
    from pallas_kernels import mosaic_prefill

    del out_dtype  # bf16, or the kernel is not selected
    return mosaic_prefill.prefill_attention(*arrays, **options)


register("prefill_attention", mosaic_gpu=_mosaic_prefill, reference=reference_attention.prefill_attention)
register("rotate_and_append", mosaic_gpu=_mosaic_append, reference=reference_rotation.rotate_and_append)
register("rotate_and_round", mosaic_gpu=_mosaic_round, reference=reference_rotation.rotate_and_round)
register("decode_attention", mosaic_gpu=_mosaic_decode, reference=reference_attention.decode_attention)


def _check_queries(op: str, q8: jax.Array, q_scale: jax.Array, kv_heads: int, head_dim: int) -> None:
    if q8.ndim != 4:
        raise ValueError(f"{op}: q8 must be [batch, tokens, heads, head_dim], got {q8.shape}")
    b, t, h, d = q8.shape
    if h % kv_heads or d != head_dim:
        raise ValueError(
            f"{op}: {h} query heads of size {d} cannot share {kv_heads} key/value heads of size {head_dim}"
        )
    require(op, "q8", q8, (b, t, h, d), (jnp.float8_e4m3fn,))
    require(op, "q_scale", q_scale, (b, t, h), (jnp.float32,))


def _check_cache(op: str, cache: tuple[jax.Array, ...], batch: int) -> None:
    k_codes, k_scales, v_codes, v_scales = cache
    if k_codes.ndim != 4:
        raise ValueError(f"{op}: k_codes must be [batch, kv heads, slots, head_dim / 2], got {k_codes.shape}")
    shape = (batch, *k_codes.shape[1:])
    require(op, "k_codes", k_codes, shape, (jnp.uint8,))
    require(op, "v_codes", v_codes, shape, (jnp.uint8,))
    require(op, "k_scales", k_scales, shape[:3], (jnp.bfloat16,))
    require(op, "v_scales", v_scales, shape[:3], (jnp.bfloat16,))


def _prefill_refusals(queries: tuple[int, ...], out_dtype: Any) -> dict[str, str]:
    """Why the Hopper kernel cannot attend with such queries, if it cannot."""
    _, tokens, _, head_dim = queries
    reason = no_hopper()
    if head_dim not in (64, 128):
        reason = f"{head_dim=} is not 64 or 128"
    elif tokens == 0:
        reason = "there are no tokens"
    elif jnp.dtype(out_dtype) != jnp.bfloat16:
        reason = f"out_dtype={jnp.dtype(out_dtype).name} is not bfloat16"
    return refused({"mosaic_gpu": reason})


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
    out_dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """FP8 causal attention of a prompt; see :func:`pallas_kernels.reference_attention.prefill_attention`.

    The Hopper kernel keeps scores in float16. Queries up to ``QUERY_MAX`` and keys up to ``KEY_MAX``, as those of
    :func:`rotate_and_round` are, allow that; if they are larger, scores may be infinite and results NaN.

    Raises:
      ValueError: shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist, or takes no such shape or device.
    """
    op = "prefill_attention"
    if k8.ndim != 4:
        raise ValueError(f"{op}: k8 must be [batch, tokens, kv heads, head_dim], got {k8.shape}")
    b, t, kv, d = k8.shape
    _check_queries(op, q8, q_scale, kv, d)
    blocks = -(-t // reference_rotation.SCALE_TOKENS)
    require(op, "k8", k8, (q8.shape[0], q8.shape[1], kv, d), (jnp.float8_e4m3fn,))
    require(op, "v8", v8, (b, kv, d, blocks * reference_rotation.SCALE_TOKENS), (jnp.float8_e4m3fn,))
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        require(op, name, scale, (b, kv, blocks), (jnp.float32,))
    require(op, "lengths", lengths, (b,), (jnp.int32,))
    if (prefix is None) != (prefix_lengths is None):
        raise ValueError(f"{op}: prefix and prefix_lengths are given together or not at all")
    if prefix is not None and prefix_lengths is not None:
        _check_cache(op, prefix, b)
        require(op, "prefix_lengths", prefix_lengths, (b,), (jnp.int32,))
    compute = select(op, implementation, _prefill_refusals(q8.shape, out_dtype))
    return compute(
        q8, q_scale, k8, k_scale, v8, v_scale, lengths, prefix, prefix_lengths,
        softmax_scale=softmax_scale, out_dtype=out_dtype,
    )  # fmt: skip


def _rotate(
    op: str,
    implementation: str | None,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: Cache,
    starts: jax.Array,
    lengths: jax.Array,
    scale: jax.Array | None,
    key_offset: jax.Array | None,
) -> Any:
    """Checks what comes out of the projections, and computes ``op`` of it."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(f"{op}: q and k must be [batch, tokens, heads, head_dim], got {q.shape} and {k.shape}")
    (b, t, h, d), kv = q.shape, k.shape[2]
    _check_cache(op, cache, b)
    for name, array in (("k", k), ("v", v)):
        require(op, name, array, (b, t, cache[0].shape[1], 2 * cache[0].shape[3]), (q.dtype,))
    require(op, "q", q, (b, t, h, k.shape[3]), (q.dtype,))
    for name, array in (("cos", cos), ("sin", sin)):
        # One table may serve all sequences.
        require(op, name, array, (1 if array.shape[:1] == (1,) else b, t, 1, d // 2), (jnp.float32,))
    cos, sin = (jnp.broadcast_to(array, (b, t, 1, d // 2)) for array in (cos, sin))
    for name, array in (("starts", starts), ("lengths", lengths)):
        require(op, name, array, (b,), (jnp.int32,))
    for name, table in (("scale", scale), ("key_offset", key_offset)):
        if table is not None:
            require(op, name, table, (kv, d), (jnp.float32,))
    if h % kv:
        raise ValueError(f"{op}: {h} query heads cannot share {kv} key/value heads")
    reason = no_hopper()
    if d not in (64, 128):
        reason = f"head_dim={d} is not 64 or 128"
    elif q.dtype != jnp.bfloat16:
        reason = f"q is {q.dtype}, not bfloat16"
    elif t == 0:
        reason = "there are no tokens"
    compute = select(op, implementation, refused({"mosaic_gpu": reason}))
    return compute(q, k, v, cos, sin, cache, starts, lengths, scale=scale, key_offset=key_offset)


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
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, Cache]:
    """E4m3 queries, and int4 keys and values in the cache.

    See :func:`pallas_kernels.reference_rotation.rotate_and_append`.

    Raises:
      ValueError: shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist, or takes no such shape or device.
    """
    arrays = (q, k, v, cos, sin, cache, starts, lengths, scale, key_offset)
    q8, q_scale, cache = _rotate("rotate_and_append", implementation, *arrays)
    return q8, q_scale, cache


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
    implementation: str | None = None,
) -> tuple[Prompt, Cache]:
    """What prefill attention takes, and the cache; see :func:`pallas_kernels.reference_rotation.rotate_and_round`.

    Raises:
      ValueError: shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist, or takes no such shape or device.
    """
    arrays = (q, k, v, cos, sin, cache, starts, lengths, scale, key_offset)
    prompt, cache = _rotate("rotate_and_round", implementation, *arrays)
    return prompt, cache


def _decode_refusals(queries: tuple[int, ...], codes: tuple[int, ...], out_dtype: Any) -> dict[str, str]:
    """Why the Hopper kernel cannot attend with such queries to such a cache, if it cannot."""
    (_, tokens, heads, head_dim), (_, kv_heads, slots, _) = queries, codes
    reason = no_hopper()
    if head_dim not in (64, 128):
        reason = f"{head_dim=} is not 64 or 128"
    elif tokens * heads // kv_heads > DECODE_ROWS:
        reason = f"{tokens} tokens of {heads // kv_heads} heads are more than {DECODE_ROWS} rows"
    elif slots % DECODE_SLOTS:
        reason = f"{slots} slots are no multiple of {DECODE_SLOTS}"
    elif jnp.dtype(out_dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        reason = f"out_dtype={jnp.dtype(out_dtype).name} is not bfloat16 or float32"
    return refused({"mosaic_gpu": reason})


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
    out_dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of new tokens to the int4 cache; see :func:`pallas_kernels.reference_attention.decode_attention`.

    Raises:
      ValueError: shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist.
    """
    op = "decode_attention"
    cache = (k_codes, k_scales, v_codes, v_scales)
    _check_cache(op, cache, q8.shape[0])
    _check_queries(op, q8, q_scale, k_codes.shape[1], 2 * k_codes.shape[3])
    require(op, "query_positions", query_positions, q8.shape[:2], (jnp.int32,))
    compute = select(op, implementation, _decode_refusals(q8.shape, k_codes.shape, out_dtype))
    return compute(q8, q_scale, *cache, query_positions, softmax_scale=softmax_scale, out_dtype=out_dtype)

"""Public entry points: shapes are checked here, then an implementation is chosen.

``implementation`` is a name, or None for the best one that supports the device and the shapes. A name that cannot
be honoured is refused before anything is traced.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import reference, weight_layout
from pallas_kernels.reference import Cache, Numerics
from pallas_kernels.sources import Rounded, Source, Ungated, Unnormed
from pallas_kernels.tiling import DECODE_ROWS, DECODE_SLOTS, MAX_ROW, MAX_TOKEN, rounds_its_input
from pallas_kernels.tuned import choose_streaming


# Mosaic takes a second to import, which only who runs a kernel should pay.
def _mosaic_matmul(
    x8: jax.Array,
    x_scale: jax.Array,
    weights: Sequence["TiledWeight"],
    residual: jax.Array | None,
    **options: Any,
) -> tuple[jax.Array, ...]:
    from pallas_kernels import mosaic_matmul

    tiles, tensor_scales, biases, sizes = zip(*weights, strict=True)
    return mosaic_matmul.matmul(x8, x_scale, tiles, tensor_scales, biases, residual, sizes=sizes, **options)


def _mosaic_matvec(
    x8: jax.Array, x_scale: jax.Array, weights: Sequence["TiledWeight"], residual: jax.Array | None, **options: Any
) -> tuple[jax.Array, ...]:
    return _mosaic_matvec_of(Rounded(x8, x_scale), weights, residual, **options)


def _mosaic_matvec_of(
    source: Source, weights: Sequence["TiledWeight"], residual: jax.Array | None, **options: Any
) -> tuple[jax.Array, ...]:
    from pallas_kernels import mosaic_matvec

    tiles, tensor_scales, biases, sizes = zip(*weights, strict=True)
    return mosaic_matvec.matvec(source, tiles, tensor_scales, biases, residual, sizes=sizes, **options)


def _reference_tiled(
    x8: jax.Array, x_scale: jax.Array, weights: Sequence["TiledWeight"], residual: jax.Array | None, **options: Any
) -> tuple[jax.Array, ...]:
    products = tuple(
        reference.int4_fp8_matmul_tiled(x8, x_scale, w.tiles, w.tensor_scale, w.bias, n=w.outputs, **options)
        for w in weights
    )
    return products if residual is None else (residual + products[0],)


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


def _mosaic_rows(name: str) -> Callable[..., Any]:
    def compute(*arrays: Any, **options: Any) -> Any:
        from pallas_kernels import mosaic_rows

        return getattr(mosaic_rows, name)(*arrays, **options)

    return compute


# Per operation, the implementations from the most to the least specialised; None takes the first that fits.
_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    "int4_fp8_matmul": {"reference": reference.int4_fp8_matmul},
    "int4_fp8_matmul_tiled": {
        "mosaic_gpu_matvec": _mosaic_matvec,
        "mosaic_gpu": _mosaic_matmul,
        "reference": _reference_tiled,
    },
    "quantize_rows": {"mosaic_gpu": _mosaic_rows("quantize_rows"), "reference": reference.quantize_fp8},
    "norm_quantize": {"mosaic_gpu": _mosaic_rows("norm_quantize"), "reference": reference.norm_quantize},
    "gate_quantize": {"mosaic_gpu": _mosaic_rows("gate_quantize"), "reference": reference.gate_quantize},
    "prefill_attention": {"mosaic_gpu": _mosaic_prefill, "reference": reference.prefill_attention},
    "rotate_and_append": {"mosaic_gpu": _mosaic_append, "reference": reference.rotate_and_append},
    "rotate_and_round": {"mosaic_gpu": _mosaic_round, "reference": reference.rotate_and_round},
    "decode_attention": {"mosaic_gpu": _mosaic_decode, "reference": reference.decode_attention},
}


def implementations(op: str) -> tuple[str, ...]:
    """Names of the implementations of ``op``, the most specialised first.

    Raises:
      ValueError: there is no such operation.
    """
    if op not in _IMPLEMENTATIONS:
        raise ValueError(f"unknown operation {op!r}; known: {sorted(_IMPLEMENTATIONS)}")
    return tuple(_IMPLEMENTATIONS[op])


def select(op: str, implementation: str | None, refusals: Mapping[str, str] | None = None) -> Callable[..., Any]:
    """The function that computes ``op``.

    Args:
      op: an operation.
      implementation: a name, or None for the first that is not in ``refusals``.
      refusals: implementations that cannot take this shape or device, and why.

    Raises:
      ValueError: there is no such operation.
      NotImplementedError: ``op`` has no implementation of that name, or it is in ``refusals``.
    """
    names, refusals = implementations(op), refusals or {}
    if implementation is None:
        return _IMPLEMENTATIONS[op][next(name for name in names if name not in refusals)]
    if implementation not in names:
        raise NotImplementedError(
            f"{op} has no {implementation!r} implementation; it has {', '.join(names)}. "
            "Pass implementation=None to take the best of them."
        )
    if implementation in refusals:
        raise NotImplementedError(
            f"{op}: {implementation} cannot run: {refusals[implementation]}. Pass implementation=None to fall back."
        )
    return _IMPLEMENTATIONS[op][implementation]


def _require(op: str, name: str, array: jax.Array, shape: tuple[int, ...], dtypes: tuple[Any, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {array.shape}")
    if array.dtype not in [jnp.dtype(d) for d in dtypes]:
        expected = " or ".join(jnp.dtype(d).name for d in dtypes)
        raise ValueError(f"{op}: {name} must be {expected}, got {array.dtype}")


def _check_activations(op: str, x8: jax.Array, x_scale: jax.Array) -> None:
    _require(op, "x8", x8, x8.shape, (jnp.float8_e4m3fn,))
    _require(op, "x_scale", x_scale, x8.shape[:1], (jnp.float32,))


def _check_factors(op: str, tensor_scale: jax.Array, bias: jax.Array | None, n: int) -> None:
    """What belongs to a weight of any layout."""
    _require(op, "tensor_scale", tensor_scale, (), (jnp.float32,))
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"{op}: bias must have shape {(n,)}, got {bias.shape}")


def int4_fp8_matmul(
    x8: jax.Array,
    x_scale: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    tensor_scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    numerics: Numerics = "exact",
    out_dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """INT4-weight, FP8-activation matrix product; see :func:`pallas_kernels.reference.int4_fp8_matmul`.

    Raises:
      ValueError: shapes or dtypes do not belong together, or ``numerics`` is unknown.
      NotImplementedError: ``implementation`` does not exist.
    """
    op = "int4_fp8_matmul"
    compute = select(op, implementation)
    if x8.ndim != 2 or codes.ndim != 2 or scales.ndim != 2:
        raise ValueError(f"{op}: x8, codes and scales are matrices, got {x8.shape}, {codes.shape}, {scales.shape}")
    k, (n, groups) = x8.shape[1], scales.shape
    if groups == 0 or k % groups or (k // groups) % 2:
        raise ValueError(f"{op}: {k=} cannot be split into {groups} groups of an even size")
    if numerics not in ("exact", "folded"):
        raise ValueError(f"{op}: {numerics=} must be 'exact' or 'folded'")
    _check_activations(op, x8, x_scale)
    _check_factors(op, tensor_scale, bias, n)
    _require(op, "codes", codes, (n, k // 2), (jnp.uint8,))
    _require(op, "scales", scales, (n, groups), (jnp.float8_e4m3fn, jnp.bfloat16))
    return compute(x8, x_scale, codes, scales, tensor_scale, bias, numerics=numerics, out_dtype=out_dtype)


def has_hopper_gpu() -> bool:
    """Whether the default device is an NVIDIA GPU of compute capability 9.0 (H100, H200)."""
    device = jax.devices()[0]
    return device.platform in ("gpu", "cuda") and getattr(device, "compute_capability", None) == "9.0"


def _no_hopper() -> str | None:
    """Why no Hopper kernel can run, if none can."""
    return None if has_hopper_gpu() else f"the default device, {jax.devices()[0]}, is no Hopper GPU"


def _named(reasons: Mapping[str, str | None]) -> dict[str, str]:
    return {name: reason for name, reason in reasons.items() if reason is not None}


class TiledWeight(NamedTuple):
    """A weight ``W[n, k]`` in the layout that the Hopper kernels stream.

    Attributes:
      tiles: int32, from :func:`pallas_kernels.to_tiles`.
      tensor_scale: scalar float32.
      bias: ``[n]`` float, or None.
      outputs: n.
    """

    tiles: jax.Array
    tensor_scale: jax.Array
    bias: jax.Array | None
    outputs: int


def _tiled_refusals(m: int, sizes: Sequence[int], k: int, share: int, out_dtype: Any) -> dict[str, str]:
    """Why the Hopper kernels cannot multiply with weights of so many outputs, if they cannot."""
    reason, n = _no_hopper(), sum(sizes)
    odd = [size for size in sizes if size % weight_layout.TILE_N]
    if odd:
        reason = f"n={odd[0]} is no multiple of {weight_layout.TILE_N}"
    elif m == 0:
        reason = "there are no tokens"
    dtype = jnp.dtype(out_dtype)
    if dtype not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        reason = f"out_dtype={dtype.name} is not bfloat16 or float32"
    many = few = reason
    if few is None and choose_streaming(m, n, k, share) is None:
        few = f"{m} tokens by {n} outputs by {k} inputs do not suit the kernel for few tokens"
    return _named({"mosaic_gpu": many, "mosaic_gpu_matvec": few})


def _check_tiled(op: str, weights: Sequence[TiledWeight], k: int, group_size: int, scale_dtype: Any) -> None:
    if not weights:
        raise ValueError(f"{op}: there are no weights")
    if group_size not in weight_layout.GROUP_SIZES or k % group_size:
        raise ValueError(f"{op}: {group_size=} must be one of {weight_layout.GROUP_SIZES} and divide {k=}")
    if jnp.dtype(scale_dtype) not in (jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.bfloat16)):
        raise ValueError(f"{op}: scale_dtype must be float8_e4m3fn or bfloat16, got {jnp.dtype(scale_dtype).name}")
    for weight in weights:
        _check_factors(op, weight.tensor_scale, weight.bias, weight.outputs)
        shape = weight_layout.tiles_shape(weight.outputs, k, group_size, scale_dtype)
        _require(op, "tiles", weight.tiles, shape, (jnp.int32,))


def _check_residual(
    op: str, residual: jax.Array | None, m: int, weights: Sequence[TiledWeight], out_dtype: Any
) -> None:
    if residual is not None:
        if len(weights) != 1:
            raise ValueError(f"{op}: a residual goes with one weight, got {len(weights)}")
        _require(op, "residual", residual, (m, weights[0].outputs), (out_dtype,))


def int4_fp8_matmuls_tiled(
    x8: jax.Array,
    x_scale: jax.Array,
    weights: Sequence[TiledWeight],
    residual: jax.Array | None = None,
    *,
    group_size: int,
    scale_dtype: Any,
    out_dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """:func:`int4_fp8_matmul` with exact numerics and several weights; one kernel takes all of them.

    Args:
      x8: ``[m, k]`` e4m3.
      x_scale: ``[m]`` float32.
      weights: at least one.
      residual: ``[m, n]`` of ``out_dtype``, to which the rounded product of the one weight is added; or None.
      group_size: inputs that share a weight scale: 32, 64 or 128, a divisor of k.
      scale_dtype: of the scales in the tiles, e4m3 or bf16.
      out_dtype: dtype of the results.
      implementation: "mosaic_gpu" (Hopper GPUs, n a multiple of 64, bf16 or float32 results), "mosaic_gpu_matvec" (the
        same for up to 8 tokens, and up to 16 of small weights), "reference", or None.

    Returns:
      ``[m, n]`` per weight.

    Raises:
      ValueError: there is no weight, or shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist, or takes no such shape or device.
    """
    op = "int4_fp8_matmul_tiled"
    if x8.ndim != 2:
        raise ValueError(f"{op}: x8 is a matrix, got {x8.shape}")
    m, k = x8.shape
    _check_activations(op, x8, x_scale)
    _check_tiled(op, weights, k, group_size, scale_dtype)
    _check_residual(op, residual, m, weights, out_dtype)
    share = weight_layout.share_bytes(group_size, scale_dtype)
    settings = {"group_size": group_size, "scale_dtype": jnp.dtype(scale_dtype), "out_dtype": out_dtype}
    refusals = _tiled_refusals(m, [weight.outputs for weight in weights], k, share, out_dtype)
    if residual is not None and residual.dtype != jnp.bfloat16:
        for name in ("mosaic_gpu", "mosaic_gpu_matvec"):
            refusals.setdefault(name, f"the residual is {residual.dtype}, not bfloat16")
    products: tuple[jax.Array, ...] = select(op, implementation, refusals)(
        x8, x_scale, weights, residual, **settings
    )  # fmt: skip
    return products


def int4_matmuls_tiled(
    source: Source,
    weights: Sequence[TiledWeight],
    residual: jax.Array | None = None,
    *,
    group_size: int,
    scale_dtype: Any,
    out_dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """:func:`int4_fp8_matmuls_tiled` of activations that may still have to be made.

    For one token that is one kernel, if ``implementation`` is None or "mosaic_gpu_matvec"; else each part has its own.

    Args:
      source: makes ``[m, k]`` e4m3 and their scales.
      weights: at least one.
      residual: as there.
      group_size: as there.
      scale_dtype: as there.
      out_dtype: as there.
      implementation: of each part, see :func:`implementations`.

    Returns:
      ``[m, n]`` per weight.

    Raises:
      ValueError: shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist, or takes no such shape or device.
    """
    op = "int4_matmuls_tiled"
    settings = {"group_size": group_size, "scale_dtype": jnp.dtype(scale_dtype)}
    if implementation in (None, "mosaic_gpu_matvec") and not isinstance(source, Rounded):
        rows = _check_source(op, source)
        if not _token_refusal(rows, weights, out_dtype, **settings):
            _check_tiled(op, weights, rows.shape[1], group_size, scale_dtype)
            _check_residual(op, residual, rows.shape[0], weights, out_dtype)
            return _mosaic_matvec_of(source, weights, residual, **settings)
    # What follows checks for itself.
    rounding = None if implementation == "mosaic_gpu_matvec" else implementation
    x8, x_scale = round_rows(source, implementation=rounding)
    return int4_fp8_matmuls_tiled(
        x8, x_scale, weights, residual, out_dtype=out_dtype, implementation=implementation, **settings
    )  # fmt: skip


def _check_source(op: str, source: Source) -> jax.Array:
    """The rows of a source whose arrays belong together."""
    rows, *others = source.arrays()
    if isinstance(source, Ungated):
        _check_rows(op, rows, *others)
    else:
        _check_rows(op, rows)
    if isinstance(source, Unnormed):
        _require(op, "gain", source.gain, rows.shape[1:], (jnp.bfloat16, jnp.float32))
    return rows


def _token_refusal(
    rows: jax.Array, weights: Sequence[TiledWeight], out_dtype: Any, group_size: int, scale_dtype: Any
) -> str | None:
    """Why no kernel rounds such rows and multiplies them, if none does."""
    (m, k), share = rows.shape, weight_layout.share_bytes(group_size, scale_dtype)
    sizes = [weight.outputs for weight in weights]
    if {rows.dtype, jnp.dtype(out_dtype)} != {jnp.dtype(jnp.bfloat16)}:
        return "activations or results are not bfloat16"
    if not rounds_its_input(choose_streaming(m, sum(sizes), k, share), m, k):
        return f"{m} tokens of {k} inputs are not one token of up to {MAX_TOKEN}"
    return _tiled_refusals(m, sizes, k, share, out_dtype).get("mosaic_gpu_matvec")


def round_rows(source: Source, *, implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
    """The e4m3 activations that a source stands for, ``[m, k]``, and their ``[m]`` float32 scales.

    Raises:
      ValueError: shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist, or takes no such rows or device.
    """
    if isinstance(source, Rounded):
        return source.values, source.scale
    if isinstance(source, Unnormed):
        return norm_quantize(source.values, source.gain, eps=source.eps, implementation=implementation)
    if isinstance(source, Ungated):
        return gate_quantize(source.gate, source.up, implementation=implementation)
    return quantize_rows(source.values, implementation=implementation)


def int4_fp8_matmul_tiled(
    x8: jax.Array,
    x_scale: jax.Array,
    tiles: jax.Array,
    tensor_scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    n: int,
    **settings: Any,
) -> jax.Array:
    """:func:`int4_fp8_matmuls_tiled` of one weight, whose parts are the fields of :class:`TiledWeight`.

    Returns:
      ``[m, n]``.
    """
    return int4_fp8_matmuls_tiled(x8, x_scale, [TiledWeight(tiles, tensor_scale, bias, n)], **settings)[0]


def _check_rows(op: str, *rows: jax.Array) -> None:
    first = rows[0]
    for other in rows:
        if other.ndim != 2 or other.shape != first.shape or other.dtype != first.dtype:
            raise ValueError(
                f"{op}: the rows must be matrices of one shape and dtype, got "
                + " and ".join(f"{r.dtype} {r.shape}" for r in rows)
            )


def _row_refusals(op: str, *rows: jax.Array) -> dict[str, str]:
    """Why the Hopper kernels cannot take such rows, if they cannot; they must be matrices of one shape and dtype.

    Raises:
      ValueError: they are not.
    """
    _check_rows(op, *rows)
    first = rows[0]
    reason, (m, k) = _no_hopper(), first.shape
    if first.dtype != jnp.bfloat16:
        reason = f"the rows are {first.dtype}, not bfloat16"
    elif k % 8 or k > MAX_ROW:
        reason = f"{k} columns are no multiple of 8 up to {MAX_ROW}"
    elif m == 0:
        reason = "there are no rows"
    return _named({"mosaic_gpu": reason})


def quantize_rows(x: jax.Array, *, implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
    """:func:`pallas_kernels.quantize_fp8` of the rows of ``[m, k]``.

    Raises:
      ValueError: x is no matrix.
      NotImplementedError: ``implementation`` does not exist, or takes no such rows or device.
    """
    op = "quantize_rows"
    return select(op, implementation, _row_refusals(op, x))(x)


def norm_quantize(
    x: jax.Array, gain: jax.Array, *, eps: float, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """An RMS norm in e4m3; see :func:`pallas_kernels.reference.norm_quantize`.

    Raises:
      ValueError: shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist, or takes no such rows or device.
    """
    op = "norm_quantize"
    refusals = _row_refusals(op, x)
    _require(op, "gain", gain, x.shape[1:], (jnp.bfloat16, jnp.float32))
    return select(op, implementation, refusals)(x, gain, eps=eps)


def gate_quantize(gate: jax.Array, up: jax.Array, *, implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
    """``silu(gate) · up`` in e4m3; see :func:`pallas_kernels.reference.gate_quantize`.

    Raises:
      ValueError: shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist, or takes no such rows or device.
    """
    op = "gate_quantize"
    return select(op, implementation, _row_refusals(op, gate, up))(gate, up)


def _check_queries(op: str, q8: jax.Array, q_scale: jax.Array, kv_heads: int, head_dim: int) -> None:
    if q8.ndim != 4:
        raise ValueError(f"{op}: q8 must be [batch, tokens, heads, head_dim], got {q8.shape}")
    b, t, h, d = q8.shape
    if h % kv_heads or d != head_dim:
        raise ValueError(
            f"{op}: {h} query heads of size {d} cannot share {kv_heads} key/value heads of size {head_dim}"
        )
    _require(op, "q8", q8, (b, t, h, d), (jnp.float8_e4m3fn,))
    _require(op, "q_scale", q_scale, (b, t, h), (jnp.float32,))


def _check_cache(op: str, cache: tuple[jax.Array, ...], batch: int) -> None:
    k_codes, k_scales, v_codes, v_scales = cache
    if k_codes.ndim != 4:
        raise ValueError(f"{op}: k_codes must be [batch, kv heads, slots, head_dim / 2], got {k_codes.shape}")
    shape = (batch, *k_codes.shape[1:])
    _require(op, "k_codes", k_codes, shape, (jnp.uint8,))
    _require(op, "v_codes", v_codes, shape, (jnp.uint8,))
    _require(op, "k_scales", k_scales, shape[:3], (jnp.bfloat16,))
    _require(op, "v_scales", v_scales, shape[:3], (jnp.bfloat16,))


def _prefill_refusals(queries: tuple[int, ...], out_dtype: Any) -> dict[str, str]:
    """Why the Hopper kernel cannot attend with such queries, if it cannot."""
    _, tokens, _, head_dim = queries
    reason = _no_hopper()
    if head_dim not in (64, 128):
        reason = f"{head_dim=} is not 64 or 128"
    elif tokens == 0:
        reason = "there are no tokens"
    elif jnp.dtype(out_dtype) != jnp.bfloat16:
        reason = f"out_dtype={jnp.dtype(out_dtype).name} is not bfloat16"
    return _named({"mosaic_gpu": reason})


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
    """FP8 causal attention of a prompt; see :func:`pallas_kernels.reference.prefill_attention`.

    The Hopper kernel keeps scores in float16. Keys of :func:`quantize_blocks` and :func:`rotate_and_round` allow that;
    if keys are larger than ``KEY_MAX``, scores may be infinite and results NaN.

    Raises:
      ValueError: shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist, or takes no such shape or device.
    """
    op = "prefill_attention"
    if k8.ndim != 4:
        raise ValueError(f"{op}: k8 must be [batch, tokens, kv heads, head_dim], got {k8.shape}")
    b, t, kv, d = k8.shape
    _check_queries(op, q8, q_scale, kv, d)
    blocks = -(-t // reference.SCALE_TOKENS)
    _require(op, "k8", k8, (q8.shape[0], q8.shape[1], kv, d), (jnp.float8_e4m3fn,))
    _require(op, "v8", v8, (b, kv, d, blocks * reference.SCALE_TOKENS), (jnp.float8_e4m3fn,))
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        _require(op, name, scale, (b, kv, blocks), (jnp.float32,))
    _require(op, "lengths", lengths, (b,), (jnp.int32,))
    if (prefix is None) != (prefix_lengths is None):
        raise ValueError(f"{op}: prefix and prefix_lengths are given together or not at all")
    if prefix is not None and prefix_lengths is not None:
        _check_cache(op, prefix, b)
        _require(op, "prefix_lengths", prefix_lengths, (b,), (jnp.int32,))
    compute = select(op, implementation, _prefill_refusals(q8.shape, out_dtype))
    return compute(
        q8, q_scale, k8, k_scale, v8, v_scale, lengths, prefix, prefix_lengths,
        softmax_scale=softmax_scale, out_dtype=out_dtype,
    )  # fmt: skip


Prompt = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


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
        _require(op, name, array, (b, t, cache[0].shape[1], 2 * cache[0].shape[3]), (q.dtype,))
    _require(op, "q", q, (b, t, h, k.shape[3]), (q.dtype,))
    for name, array in (("cos", cos), ("sin", sin)):
        # One table may serve all sequences.
        _require(op, name, array, (1 if array.shape[:1] == (1,) else b, t, 1, d // 2), (jnp.float32,))
    cos, sin = (jnp.broadcast_to(array, (b, t, 1, d // 2)) for array in (cos, sin))
    for name, array in (("starts", starts), ("lengths", lengths)):
        _require(op, name, array, (b,), (jnp.int32,))
    for name, table in (("scale", scale), ("key_offset", key_offset)):
        if table is not None:
            _require(op, name, table, (kv, d), (jnp.float32,))
    if h % kv:
        raise ValueError(f"{op}: {h} query heads cannot share {kv} key/value heads")
    reason = _no_hopper()
    if d not in (64, 128):
        reason = f"head_dim={d} is not 64 or 128"
    elif q.dtype != jnp.bfloat16:
        reason = f"q is {q.dtype}, not bfloat16"
    elif t == 0:
        reason = "there are no tokens"
    compute = select(op, implementation, _named({"mosaic_gpu": reason}))
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
    """E4m3 queries, and int4 keys and values in the cache; see :func:`pallas_kernels.reference.rotate_and_append`.

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
    """What prefill attention takes, and the cache; see :func:`pallas_kernels.reference.rotate_and_round`.

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
    reason = _no_hopper()
    if head_dim not in (64, 128):
        reason = f"{head_dim=} is not 64 or 128"
    elif tokens * heads // kv_heads > DECODE_ROWS:
        reason = f"{tokens} tokens of {heads // kv_heads} heads are more than {DECODE_ROWS} rows"
    elif slots % DECODE_SLOTS:
        reason = f"{slots} slots are no multiple of {DECODE_SLOTS}"
    elif jnp.dtype(out_dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        reason = f"out_dtype={jnp.dtype(out_dtype).name} is not bfloat16 or float32"
    return _named({"mosaic_gpu": reason})


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
    """Attention of new tokens to the int4 cache; see :func:`pallas_kernels.reference.decode_attention`.

    Raises:
      ValueError: shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist.
    """
    op = "decode_attention"
    cache = (k_codes, k_scales, v_codes, v_scales)
    _check_cache(op, cache, q8.shape[0])
    _check_queries(op, q8, q_scale, k_codes.shape[1], 2 * k_codes.shape[3])
    _require(op, "query_positions", query_positions, q8.shape[:2], (jnp.int32,))
    compute = select(op, implementation, _decode_refusals(q8.shape, k_codes.shape, out_dtype))
    return compute(q8, q_scale, *cache, query_positions, softmax_scale=softmax_scale, out_dtype=out_dtype)

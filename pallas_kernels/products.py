"""Products with INT4 weights: shapes are checked here, then an implementation is chosen."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import reference, weight_layout
from pallas_kernels.dispatch import no_hopper, refused, register, require, select
from pallas_kernels.reference import Numerics
from pallas_kernels.rows import check_source, round_rows
from pallas_kernels.sources import Rounded, Source, Ungated
from pallas_kernels.tiling import FLAGS, Tiling, rounds_its_input
from pallas_kernels.tuned import choose_cut, choose_streaming


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


def _mosaic_matmul(
    x: Rounded, weights: Sequence[TiledWeight], residual: jax.Array | None, **options: Any
) -> tuple[jax.Array, ...]:
    from pallas_kernels import mosaic_matmul

    tiles, tensor_scales, biases, sizes = zip(*weights, strict=True)
    return mosaic_matmul.matmul(
        x.values, x.scale, tiles, tensor_scales, biases, residual, x.flags, sizes=sizes, **options
    )


def _mosaic_matvec(
    x: Rounded, weights: Sequence[TiledWeight], residual: jax.Array | None, **options: Any
) -> tuple[jax.Array, ...]:
    del options["numerics"]  # exact, or the kernel is not selected
    return _mosaic_matvec_of(x, weights, residual, **options)


def _mosaic_matvec_of(
    source: Source, weights: Sequence[TiledWeight], residual: jax.Array | None, **options: Any
) -> tuple[jax.Array, ...]:
    from pallas_kernels import mosaic_matvec

    tiles, tensor_scales, biases, sizes = zip(*weights, strict=True)
    return mosaic_matvec.matvec(source, tiles, tensor_scales, biases, residual, sizes=sizes, **options)


def _reference_tiled(
    x: Rounded, weights: Sequence[TiledWeight], residual: jax.Array | None, **options: Any
) -> tuple[jax.Array, ...]:
    products = tuple(
        reference.int4_fp8_matmul_tiled(x.values, x.scale, w.tiles, w.tensor_scale, w.bias, n=w.outputs, **options)
        for w in weights
    )
    return products if residual is None else (residual + products[0],)


register("int4_fp8_matmul", reference=reference.int4_fp8_matmul)
register(
    "int4_fp8_matmul_tiled", mosaic_gpu_matvec=_mosaic_matvec, mosaic_gpu=_mosaic_matmul, reference=_reference_tiled
)


def _check_activations(op: str, x8: jax.Array, x_scale: jax.Array) -> None:
    require(op, "x8", x8, x8.shape, (jnp.float8_e4m3fn,))
    require(op, "x_scale", x_scale, x8.shape[:1], (jnp.float32,))


def _check_numerics(op: str, numerics: str) -> None:
    if numerics not in ("exact", "folded"):
        raise ValueError(f"{op}: {numerics=} must be 'exact' or 'folded'")


def _check_factors(op: str, tensor_scale: jax.Array, bias: jax.Array | None, n: int) -> None:
    """What belongs to a weight of any layout."""
    require(op, "tensor_scale", tensor_scale, (), (jnp.float32,))
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
    _check_numerics(op, numerics)
    _check_activations(op, x8, x_scale)
    _check_factors(op, tensor_scale, bias, n)
    require(op, "codes", codes, (n, k // 2), (jnp.uint8,))
    require(op, "scales", scales, (n, groups), (jnp.float8_e4m3fn, jnp.bfloat16))
    return compute(x8, x_scale, codes, scales, tensor_scale, bias, numerics=numerics, out_dtype=out_dtype)


def _tiled_refusals(
    m: int, sizes: Sequence[int], k: int, share: int, numerics: Numerics, out_dtype: Any
) -> dict[str, str]:  # fmt: skip
    """Why the Hopper kernels cannot multiply with weights of so many outputs, if they cannot."""
    reason, n = no_hopper(), sum(sizes)
    odd = [size for size in sizes if size % weight_layout.TILE_N]
    if odd:
        reason = f"n={odd[0]} is no multiple of {weight_layout.TILE_N}"
    elif m == 0:
        reason = "there are no tokens"
    dtype = jnp.dtype(out_dtype)
    if dtype not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        reason = f"out_dtype={dtype.name} is not bfloat16 or float32"
    many = few = reason
    if few is None and numerics != "exact":
        few = f"{numerics=} is for the kernel of many tokens"
    if few is None and choose_streaming(m, n, k, share) is None:
        few = f"{m} tokens by {n} outputs by {k} inputs do not suit the kernel for few tokens"
    return refused({"mosaic_gpu": many, "mosaic_gpu_matvec": few})


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
        require(op, "tiles", weight.tiles, shape, (jnp.int32,))


def _check_residual(
    op: str, residual: jax.Array | None, m: int, weights: Sequence[TiledWeight], out_dtype: Any
) -> None:
    if residual is not None:
        if len(weights) != 1:
            raise ValueError(f"{op}: a residual goes with one weight, got {len(weights)}")
        require(op, "residual", residual, (m, weights[0].outputs), (out_dtype,))


def int4_fp8_matmuls_tiled(
    x8: jax.Array,
    x_scale: jax.Array,
    weights: Sequence[TiledWeight],
    residual: jax.Array | None = None,
    *,
    group_size: int,
    scale_dtype: Any,
    numerics: Numerics = "exact",
    out_dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """:func:`int4_fp8_matmul` with several weights; one kernel takes all of them.

    Args:
      x8: ``[m, k]`` e4m3.
      x_scale: ``[m]`` float32.
      weights: at least one.
      residual: ``[m, n]`` of ``out_dtype``, to which the rounded product of the one weight is added; or None.
      group_size: inputs that share a weight scale: 32, 64 or 128, a divisor of k.
      scale_dtype: of the scales in the tiles, e4m3 or bf16.
      numerics: "exact" or "folded".
      out_dtype: dtype of the results.
      implementation: "mosaic_gpu" (Hopper GPUs, n a multiple of 64, bf16 or float32 results), "mosaic_gpu_matvec" (the
        same with exact numerics, for up to 8 tokens, or 16 where that was measured to be faster), "reference", or None.

    Returns:
      ``[m, n]`` per weight.

    Raises:
      ValueError: there is no weight, shapes or dtypes do not belong together, or ``numerics`` is unknown.
      NotImplementedError: ``implementation`` does not exist, or takes no such shape or device.
    """
    return _multiply(
        Rounded(x8, x_scale), weights, residual,
        group_size=group_size, scale_dtype=scale_dtype, numerics=numerics, out_dtype=out_dtype,
        implementation=implementation,
    )  # fmt: skip


def _multiply(
    x: Rounded,
    weights: Sequence[TiledWeight],
    residual: jax.Array | None,
    *,
    group_size: int,
    scale_dtype: Any,
    numerics: Numerics,
    out_dtype: Any,
    implementation: str | None,
) -> tuple[jax.Array, ...]:
    """:func:`int4_fp8_matmuls_tiled` of rows that may have flags."""
    op = "int4_fp8_matmul_tiled"
    if x.values.ndim != 2:
        raise ValueError(f"{op}: x8 is a matrix, got {x.values.shape}")
    m, k = x.values.shape
    _check_numerics(op, numerics)
    _check_activations(op, x.values, x.scale)
    if x.flags is not None:
        require(op, "flags", x.flags, (FLAGS,), (jnp.int32,))
    _check_tiled(op, weights, k, group_size, scale_dtype)
    _check_residual(op, residual, m, weights, out_dtype)
    share = weight_layout.share_bytes(group_size, scale_dtype)
    settings = {"group_size": group_size, "scale_dtype": jnp.dtype(scale_dtype), "numerics": numerics}
    sizes = [weight.outputs for weight in weights]
    refusals = _tiled_refusals(m, sizes, k, share, numerics, out_dtype)
    if residual is not None and residual.dtype != jnp.bfloat16:
        for name in ("mosaic_gpu", "mosaic_gpu_matvec"):
            refusals.setdefault(name, f"the residual is {residual.dtype}, not bfloat16")
    undecided = implementation is None and "mosaic_gpu_matvec" not in refusals
    if undecided and isinstance(choose_cut(m, sum(sizes), k, share), Tiling):
        refusals["mosaic_gpu_matvec"] = "the other kernel is faster"
    products: tuple[jax.Array, ...] = select(op, implementation, refusals)(
        x, weights, residual, out_dtype=out_dtype, **settings
    )
    return products


def int4_matmuls_tiled(
    source: Source,
    weights: Sequence[TiledWeight],
    residual: jax.Array | None = None,
    *,
    group_size: int,
    scale_dtype: Any,
    numerics: Numerics = "exact",
    out_dtype: Any = jnp.bfloat16,
    implementation: str | None = None,
) -> tuple[jax.Array, ...]:
    """:func:`int4_fp8_matmuls_tiled` of activations that may still have to be made.

    For one token, and up to four whose gate need not be opened, that is one kernel, if ``implementation`` is None or
    "mosaic_gpu_matvec"; else each part has its own.

    Args:
      source: makes ``[m, k]`` e4m3 and their scales.
      weights: at least one.
      residual: as there.
      group_size: as there.
      scale_dtype: as there.
      numerics: as there.
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
    _check_numerics(op, numerics)
    if implementation in (None, "mosaic_gpu_matvec") and numerics == "exact" and not isinstance(source, Rounded):
        rows = check_source(op, source)
        if not _token_refusal(rows, isinstance(source, Ungated), weights, out_dtype, **settings):
            _check_tiled(op, weights, rows.shape[1], group_size, scale_dtype)
            _check_residual(op, residual, rows.shape[0], weights, out_dtype)
            return _mosaic_matvec_of(source, weights, residual, **settings)
    # What follows checks for itself.
    rounding = None if implementation == "mosaic_gpu_matvec" else implementation
    return _multiply(
        round_rows(source, implementation=rounding), weights, residual,
        numerics=numerics, out_dtype=out_dtype, implementation=implementation, **settings,
    )  # fmt: skip


def _token_refusal(
    rows: jax.Array, gated: bool, weights: Sequence[TiledWeight], out_dtype: Any, group_size: int, scale_dtype: Any
) -> str | None:
    """Why no kernel rounds such rows and multiplies them, if none does."""
    (m, k), share = rows.shape, weight_layout.share_bytes(group_size, scale_dtype)
    sizes = [weight.outputs for weight in weights]
    if {rows.dtype, jnp.dtype(out_dtype)} != {jnp.dtype(jnp.bfloat16)}:
        return "activations or results are not bfloat16"
    if not rounds_its_input(choose_streaming(m, sum(sizes), k, share), m, k, gated):
        return f"{m} tokens of {k} inputs are too many to be rounded by every block"
    return _tiled_refusals(m, sizes, k, share, "exact", out_dtype).get("mosaic_gpu_matvec")


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

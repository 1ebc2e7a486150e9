"""Operations on rows of activations that give e4m3: shapes are checked here, then an implementation is chosen."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import reference
from pallas_kernels.dispatch import no_hopper, refused, register, require, select
from pallas_kernels.sources import Rounded, Source, Ungated, Unnormed, Unrounded
from pallas_kernels.tiling import MAX_ROW


def _mosaic_rows(name: str) -> Callable[..., Rounded]:
    def compute(*arrays: Any, **options: Any) -> Rounded:
        from pallas_kernels import mosaic_rows

        return Rounded(*getattr(mosaic_rows, name)(*arrays, **options))

    return compute


def _reference_rows(operation: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., Rounded]:
    return lambda *arrays, **options: Rounded(*operation(*arrays, **options))


register("quantize_rows", mosaic_gpu=_mosaic_rows("quantize_rows"), reference=_reference_rows(reference.quantize_fp8))
register("norm_quantize", mosaic_gpu=_mosaic_rows("norm_quantize"), reference=_reference_rows(reference.norm_quantize))
register("gate_quantize", mosaic_gpu=_mosaic_rows("gate_quantize"), reference=_reference_rows(reference.gate_quantize))


def check_source(op: str, source: Source) -> jax.Array:
    """The rows of a source whose arrays belong together.

    Raises:
      ValueError: they do not, as rows are not matrices of one shape and dtype, or there is no gain for each column.
    """
    first, *others = source.arrays()
    rows = [first, *others] if isinstance(source, Ungated) else [first]
    for row in rows:
        if row.ndim != 2 or row.shape != first.shape or row.dtype != first.dtype:
            raise ValueError(
                f"{op}: the rows must be matrices of one shape and dtype, got "
                + " and ".join(f"{r.dtype} {r.shape}" for r in rows)
            )
    if isinstance(source, Unnormed):
        require(op, "gain", source.gain, first.shape[1:], (jnp.bfloat16, jnp.float32))
    return first


def _row_refusals(rows: jax.Array) -> dict[str, str]:
    """Why the Hopper kernels cannot take rows of such a matrix, if they cannot."""
    reason, (m, k) = no_hopper(), rows.shape
    if rows.dtype != jnp.bfloat16:
        reason = f"the rows are {rows.dtype}, not bfloat16"
    elif k % 8 or k > MAX_ROW:
        reason = f"{k} columns are no multiple of 8 up to {MAX_ROW}"
    elif m == 0:
        reason = "there are no rows"
    return refused({"mosaic_gpu": reason})


def quantize_rows(x: jax.Array, *, implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
    """:func:`pallas_kernels.quantize_fp8` of the rows of ``[m, k]``.

    Raises:
      ValueError: x is no matrix.
      NotImplementedError: ``implementation`` does not exist, or takes no such rows or device.
    """
    rows = round_rows(Unrounded(x), implementation=implementation)
    return rows.values, rows.scale


def norm_quantize(
    x: jax.Array, gain: jax.Array, *, eps: float, implementation: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """An RMS norm in e4m3; see :func:`pallas_kernels.reference.norm_quantize`.

    Raises:
      ValueError: shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist, or takes no such rows or device.
    """
    rows = round_rows(Unnormed(x, gain, eps), implementation=implementation)
    return rows.values, rows.scale


def gate_quantize(gate: jax.Array, up: jax.Array, *, implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
    """``silu(gate) · up`` in e4m3; see :func:`pallas_kernels.reference.gate_quantize`.

    Raises:
      ValueError: shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist, or takes no such rows or device.
    """
    rows = round_rows(Ungated(gate, up), implementation=implementation)
    return rows.values, rows.scale


def round_rows(source: Source, *, implementation: str | None = None) -> Rounded:
    """The e4m3 activations that a source stands for, ``[m, k]``, and their ``[m]`` float32 scales.

    Raises:
      ValueError: shapes or dtypes do not belong together.
      NotImplementedError: ``implementation`` does not exist, or takes no such rows or device.
    """
    if isinstance(source, Rounded):
        return source
    op = {Unrounded: "quantize_rows", Unnormed: "norm_quantize", Ungated: "gate_quantize"}[type(source)]
    refusals = _row_refusals(check_source(op, source))
    options = {"eps": source.eps} if isinstance(source, Unnormed) else {}
    rounded: Rounded = select(op, implementation, refusals)(*source.arrays(), **options)
    return rounded

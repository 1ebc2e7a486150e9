"""Kernels that make the e4m3 activations of a product in one pass over their rows, in Pallas:Mosaic GPU.

A block holds a row in its registers: it is read once and written once, whatever precedes the rounding. XLA needs a
kernel per reduction, three to four for a norm and its rounding. Of few long rows a gate's are shared by clusters.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.row_steps import MAX_WARPGROUPS, VECTOR, Steps
from pallas_kernels.tiling import FLAGS, STREAMING_MULTIPROCESSORS

REGISTERS = 65536  # of a multiprocessor
MOST_VECTORS = 8  # of a thread, unless a row has more than blocks of MAX_WARPGROUPS hold
GATE_PARTS = 4  # blocks that share a row of a gate at most: two powers per element keep one busy
SHARED_ELEMENTS = 2048  # of a row that a block takes at least, where several share it


def _launch(name: str, body: Any, ops: Steps, m: int, outputs: list[tuple[tuple[int, ...], Any]]) -> Operation:
    cluster: dict[str, Any] = {"cluster": (ops.parts,), "cluster_names": ("part",)} if ops.parts > 1 else {}
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in outputs),
        scratch_types=[plgpu.SMEM((ops.warps + ops.parts,), jnp.float32), plgpu.SMEM((ops.warps,), jnp.float32)],
        grid=(m,),
        grid_names=("row",),
        num_threads=ops.warps // 4,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
        kernel_name=name,
        **cluster,
    )
    return cast(Operation, kernel)


def _steps(m: int, k: int, most_parts: int = 1) -> Steps:
    """Of those blocks of which most find place on a multiprocessor the ones with most threads.

    However few the rows are, wider blocks for them are no faster. Up to ``most_parts`` blocks share a row while there
    are multiprocessors for them and each has much to do.
    """
    parts = 1
    while 2 * parts <= most_parts and 2 * parts * m <= STREAMING_MULTIPROCESSORS and k >= SHARED_ELEMENTS * 2 * parts:
        parts *= 2
    vectors = -(-k // (VECTOR * parts * hopper.WARPGROUP))  # of a thread, were there one warpgroup

    def resident(warpgroups: int) -> int:
        registers = 16 * (-(-vectors // warpgroups) + 1)  # of a thread, within 8 of what compilers take
        return REGISTERS // (registers * hopper.WARPGROUP * warpgroups)

    # For each number of vectors the fewest that hold a row, so that no warpgroup has nothing to do.
    fewest = (-(-vectors // each) for each in range(1, MOST_VECTORS + 1))
    candidates = [warpgroups for warpgroups in fewest if warpgroups <= MAX_WARPGROUPS] or [MAX_WARPGROUPS]
    return Steps(k, max(candidates, key=lambda warpgroups: (resident(warpgroups), warpgroups)), parts)


def _rounded(m: int, k: int) -> list[tuple[tuple[int, ...], Any]]:
    """The results of a kernel: rows, their scales, and zeros for :attr:`pallas_kernels.Rounded.flags`."""
    return [((m, k), jnp.float8_e4m3fn), ((m,), jnp.float32), ((FLAGS,), jnp.int32)]


@jax.jit
def quantize_rows(x: jax.Array) -> tuple[jax.Array, ...]:
    """:func:`pallas_kernels.reference.quantize_fp8` of the rows of ``[m, k]`` bf16, k a multiple of 8, and flags."""
    m, k = x.shape
    ops = _steps(m, k)

    def body(x: Any, x8: Any, x_scale: Any, flags: Any, scratch: Any, _: Any) -> None:
        row = jax.lax.axis_index("row")
        ops.clear()(flags, row)
        ops.quantize()(ops.load()(x, row), x8, x_scale, scratch, row)

    return _launch("quantize_rows", body, ops, m, _rounded(m, k))(x)


@functools.partial(jax.jit, static_argnames=("eps",))
def norm_quantize(x: jax.Array, gain: jax.Array, *, eps: float) -> tuple[jax.Array, ...]:
    """:func:`pallas_kernels.reference.norm_quantize` of ``[m, k]`` bf16, k a multiple of 8, and flags."""
    m, k = x.shape
    ops, gain_dtype = _steps(m, k), gain.dtype

    def body(x: Any, gain: Any, x8: Any, x_scale: Any, flags: Any, sums: Any, peaks: Any) -> None:
        row = jax.lax.axis_index("row")
        ops.clear()(flags, row)
        values = ops.normalize(eps, gain_dtype)(ops.load()(x, row), gain, sums)
        ops.quantize()(values, x8, x_scale, peaks, row)

    return _launch("norm_quantize", body, ops, m, _rounded(m, k))(x, gain)


@jax.jit
def gate_quantize(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, ...]:
    """:func:`pallas_kernels.reference.gate_quantize` of ``[m, k]`` bf16, k a multiple of 8, and flags."""
    m, k = gate.shape
    ops = _steps(m, k, GATE_PARTS)

    def body(gate: Any, up: Any, x8: Any, x_scale: Any, flags: Any, scratch: Any, _: Any) -> None:
        if ops.parts > 1:
            hopper.cluster_arrive()
        row = jax.lax.axis_index("row")
        ops.clear()(flags, row)
        ops.quantize()(ops.gate()(ops.load()(gate, row), up, row), x8, x_scale, scratch, row)

    return _launch("gate_quantize", body, ops, m, _rounded(m, k))(gate, up)

"""The INT4 x FP8 matrix product for a few tokens on Hopper, in Pallas:Mosaic GPU.

With few tokens the product takes as long as the weight needs to be read, so the kernel is made to keep reads in flight.
A unit is 16 outputs, one share of the weight tiles. The warps of a team share the inputs of a unit: of a team of four,
each takes every fourth tile, converts the codes to float16 and multiplies them with ``mma.sync``. It has its tiles
copied to slots of its own in shared memory, ahead and across units, from the first instructions of the kernel on. No
warp waits for another one but where a team's partial sums are added up.
``docs/kernels.md`` says what was tried and measured.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.matvec_steps import Steps
from pallas_kernels.mosaic_matmul import as_vectors
from pallas_kernels.sources import Rounded, Source, Ungated
from pallas_kernels.tiling import SUMS_PITCH, WARPS, Streaming, rounds_its_input
from pallas_kernels.token_steps import TokenSteps
from pallas_kernels.tuned import choose_streaming
from pallas_kernels.weight_layout import share_bytes


def make_kernel(
    m: int,
    sizes: tuple[int, ...],
    k: int,
    group_size: int,
    scale_dtype: Any,
    out_dtype: Any,
    has_bias: bool,
    has_residual: bool,
    cut: Streaming,
    source: Source,
) -> Operation:
    """The kernel for one shape: ``(*inputs, *tiles, *tensor_scales [1], *biases [n] if any) -> *y [m, n]``.

    Inputs are the arrays of the source; and the residual, if there is one.
    """
    ops = Steps(m, sizes, k, group_size, scale_dtype, out_dtype, cut)
    unrounded = None if isinstance(source, Rounded) else TokenSteps(ops, source)
    parts, turns, steps = cut.parts(k), cut.turns(sum(sizes)), cut.steps()
    chunks = cut.rounds // steps
    weights = len(sizes)
    sums_size = SUMS_PITCH * 8 * ops.blocks_of_tokens

    def body(*refs: Any) -> None:
        counts = (len(source.arrays()), has_residual, weights, weights, weights * has_bias)
        ends = itertools.accumulate((*counts, weights), initial=0)
        of_x, residual, w, tensor_scales, biases, y = (refs[start:end] for start, end in itertools.pairwise(ends))
        held, partial, slots, arrivals, token_scales, *kept = refs[len(refs) - len(scratch) :]
        block = jax.lax.axis_index("block")
        warp = ops.slots.warp()()

        def after(part: Any, turn: Any, chunk: Any) -> tuple[Any, Any, Any]:
            """The part, turn and chunk that come next; they are gone through in this order, chunks first."""
            chunk, turn = (chunk + 1, turn) if chunks > 1 else (chunk, turn + 1)
            if chunks > 1:
                turn += (chunk == chunks).astype(jnp.int32)
                chunk = jnp.where(chunk == chunks, 0, chunk)
            if parts > 1:  # else units behind the last one do not exist
                part += (turn == turns).astype(jnp.int32)
                turn = jnp.where(turn == turns, 0, turn)
            return part, turn, chunk

        def unit(turn: Any) -> Any:
            return block + turn * (ops.teams * ops.blocks)

        def locate(part: Any, turn: Any, chunk: Any) -> Any:
            """Where the shares of a chunk are."""
            first, end = (part * cut.rounds + chunk * steps) * cut.team, jnp.int32(ops.tiles)
            if parts > 1:
                end = jnp.where(part < parts, jnp.minimum(end, (part + 1) * ops.held), 0)
            return ops.locate()(warp, unit(turn), first, end, *w)

        def used(use: Any, count: int) -> Any:
            """What ``use`` is after so many steps: it counts up to twice the slots, and begins anew."""
            use += count % (2 * cut.slots)
            return jnp.where(use >= 2 * cut.slots, use - 2 * cut.slots, use)

        def slot_of(use: Any) -> tuple[Any, Any]:
            """The slot that it means, and the parity of its phase."""
            odd = (use >= cut.slots).astype(jnp.int32)
            return use - odd * cut.slots, odd

        ops.slots.open()(arrivals)
        # First, for all waits for the inputs, and what is read behind many tiles arrives behind them.
        if unrounded is None:
            inputs = ops.load_inputs()(of_x[0], jnp.int32(0))
            factors = ops.load_factors(True)(of_x[1], *tensor_scales)
        else:
            words = unrounded.load()(*of_x)
            factors = ops.load_factors(False)(*tensor_scales)
        at = (jnp.int32(0),) * 3
        ahead = []  # places of the chunks that come next
        for step in range(cut.slots):
            if step % steps == 0:
                ahead.append(locate(*at))
                at = after(*at)
            ops.request(step % steps, reads=False)(warp, ahead[-1], slots, arrivals, jnp.int32(step))
        if unrounded is not None:
            factors = unrounded.hold()(words, factors, held, partial.at[0], partial.at[1], token_scales)
        else:
            ops.hold_inputs()(inputs, held)
        ops.barrier()()

        def next_part(part: Any) -> None:
            ops.barrier()()
            ops.hold_inputs()(ops.load_inputs()(of_x[0], part * ops.held), held)
            ops.barrier()()

        def run_chunk(part: Any, turn: Any, chunk: Any, carry: Any) -> Any:
            """Multiplies; and requests what comes ``cut.slots`` steps later, into the slot that becomes free."""
            use, ahead, sums = carry
            furthest = (part, turn, chunk)
            for _ in ahead:
                furthest = after(*furthest)
            ahead = [*ahead, locate(*furthest)]
            for step in range(steps):
                slot, parity = slot_of(used(use, step))
                codes, scales = ops.take(step)(warp, ahead[0], slots, arrivals, slot, parity)
                later, its_step = divmod(step + cut.slots, steps)
                ops.request(its_step, reads=True)(warp, ahead[later], slots, arrivals, slot, codes, scales)
                first = chunk * (steps * cut.team)
                sums = ops.multiply(step)(warp, sums, codes, scales, held, first)
            return used(use, steps), ahead[1:], sums

        def run_unit(part: Any, turn: Any, carry: Any) -> Any:
            use, ahead = carry
            sums = jnp.zeros((hopper.WARPGROUP * 2 * ops.columns * ops.blocks_of_tokens,), jnp.float32)
            carry = use, ahead, plgpu.layout_cast(sums, ops.layout["sums"])
            if chunks == 1:
                carry = run_chunk(part, turn, jnp.int32(0), carry)
            else:
                carry = jax.lax.fori_loop(0, chunks, lambda i, carry: run_chunk(part, turn, i, carry), carry)
            use, ahead, sums = carry
            odd = jax.lax.rem(part * turns + turn, jnp.int32(2))
            before = [*kept, turn] if parts > 1 else []
            finish = ops.finish(has_bias, parts, has_residual)
            finish(warp, sums, partial.at[odd], factors, unit(turn), part, *before, *residual, *y, *biases)
            return use, ahead

        def run_part(part: Any, carry: Any) -> Any:
            if parts > 1:
                pl.when(part > 0)(lambda: next_part(part))
            return jax.lax.fori_loop(0, turns, lambda turn, carry: run_unit(part, turn, carry), carry)

        jax.lax.fori_loop(0, parts, run_part, (jnp.int32(0), ahead))

    scratch: list[Any] = [
        plgpu.SMEM((m * ops.pitch // 4,), jnp.int32),
        plgpu.SMEM((2, WARPS * sums_size), jnp.float32),
        plgpu.SMEM((cut.slots * WARPS * ops.share_bytes // 4,), jnp.int32),
        plgpu.SMEM((cut.slots * WARPS * 2,), jnp.int32),
        plgpu.SMEM((WARPS,), jnp.float32),
    ]
    if parts > 1:
        scratch.append(plgpu.SMEM((turns * ops.teams * sums_size,), jnp.float32))
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct((m, n), out_dtype) for n in sizes),
        scratch_types=scratch,
        grid=(ops.blocks,),
        grid_names=("block",),
        num_threads=WARPS // 4,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
        kernel_name="int4_matvec",
    )
    return cast(Operation, kernel)


@functools.partial(jax.jit, static_argnames=("sizes", "group_size", "scale_dtype", "out_dtype", "cut"))
def matvec(
    source: Source,
    tiles: Sequence[jax.Array],
    tensor_scales: Sequence[jax.Array],
    biases: Sequence[jax.Array | None],
    residual: jax.Array | None = None,
    *,
    sizes: tuple[int, ...],
    group_size: int,
    scale_dtype: Any,
    out_dtype: Any = jnp.bfloat16,
    cut: Streaming | None = None,
) -> tuple[jax.Array, ...]:
    """:func:`pallas_kernels.mosaic_matmul.matmul` of up to 16 tokens, with float32 sums.

    Few tokens need not be rounded: every block rounds all of them for itself, in the time that its first weights take
    to come.

    Args:
      source: ``[m, k]``, m up to 16; e4m3, or one bf16 row of up to 16384 inputs, or up to four without a gate, as
        :func:`pallas_kernels.tiling.rounds_its_input` says. The gain of a norm may be float32.
      tiles: int32, per weight what :func:`pallas_kernels.weight_layout.to_tiles` makes of it.
      tensor_scales: per weight, scalar float32.
      biases: per weight ``[n]`` float, or None.
      residual: ``[m, n]`` bf16 that is added to the (rounded) product of the one weight; or None.
      sizes: outputs n of each weight, multiples of 64.
      group_size: 32, 64 or 128, a divisor of k.
      scale_dtype: of the group scales in ``tiles``, e4m3 or bf16.
      out_dtype: of the results, bf16 or float32.
      cut: chosen by :func:`choose_streaming` if None.

    Returns:
      Per weight ``[m, n]``.

    Raises:
      NotImplementedError: there are more tokens, or sums of that many outputs do not fit into shared memory; or what is
        not rounded are no such tokens.
    """
    m, k = source.arrays()[0].shape
    n = sum(sizes)
    cut = cut or choose_streaming(m, n, k, share_bytes(group_size, scale_dtype))
    if cut is None:
        raise NotImplementedError(f"{m} tokens by {n} outputs by {k} inputs do not suit the kernel for few tokens")
    if not isinstance(source, Rounded) and not rounds_its_input(cut, m, k, isinstance(source, Ungated)):
        raise NotImplementedError(f"{m} tokens of {k} inputs are too many to be rounded by every block")
    has_bias, has_residual = any(bias is not None for bias in biases), residual is not None
    kernel = make_kernel(
        m, sizes, k, group_size, jnp.dtype(scale_dtype), jnp.dtype(out_dtype), has_bias, has_residual, cut, source
    )  # fmt: skip
    beside = [] if residual is None else [residual]
    return tuple(kernel(*source.arrays(), *beside, *tiles, *as_vectors(sizes, tensor_scales, biases)))

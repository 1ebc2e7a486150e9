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
from pallas_kernels.sources import Rounded, Source
from pallas_kernels.tiling import MAX_TOKEN, SUMS_PITCH, WARPS, Streaming, rounds_its_input
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
    parts, turns = cut.parts(k), cut.turns(sum(sizes))
    weights = len(sizes)
    sums_size = SUMS_PITCH * 8 * ops.blocks_of_tokens

    def body(*refs: Any) -> None:
        counts = (len(source.arrays()), has_residual, weights, weights, weights * has_bias)
        ends = itertools.accumulate((*counts, weights), initial=0)
        of_x, residual, w, tensor_scales, biases, y = (refs[start:end] for start, end in itertools.pairwise(ends))
        held, partial, slots, arrivals, *others = refs[len(refs) - len(scratch) :]
        input_sums, kept = others[: cut.raw], others[cut.raw :]
        block = jax.lax.axis_index("block")

        def after(at: Any) -> Any:
            """The part, turn and round that come next; they are gone through in this order, rounds first."""
            part, turn, at_round = at
            at_round += 1
            turn += (at_round == cut.rounds).astype(jnp.int32)
            at_round = jnp.where(at_round == cut.rounds, 0, at_round)
            part += (turn == turns).astype(jnp.int32)
            return part, jnp.where(turn == turns, 0, turn), at_round

        def unit(turn: Any) -> Any:
            return block + turn * (ops.teams * ops.blocks)

        def request(at: Any, slot: Any) -> None:
            part, turn, at_round = at
            tile = (part * cut.rounds + at_round) * cut.team
            ops.request()(slots, arrivals, slot, unit(turn), tile, (part < parts).astype(jnp.int32), *w)

        def sum_inputs() -> None:
            if cut.raw:
                ops.sum_inputs()(held, *input_sums)
                ops.barrier()()

        ops.slots.open()(arrivals)
        # First, for all waits for the inputs, and what is read behind many tiles arrives behind them.
        if unrounded is None:
            inputs = ops.load_inputs()(of_x[0], jnp.int32(0))
            factors = ops.load_factors(True)(of_x[1], *tensor_scales)
        else:
            raw = unrounded.load()(*of_x)
            factors = ops.load_factors(False)(*tensor_scales)
        to_read = (jnp.int32(0),) * 3
        for slot in range(cut.slots):
            request(to_read, jnp.int32(slot))
            to_read = after(to_read)
        if unrounded is not None:
            factors = unrounded.hold()(raw, factors, held, partial.at[0], partial.at[1])
        else:
            ops.hold_inputs()(inputs, held)
        ops.barrier()()
        sum_inputs()

        def step(_: Any, carry: Any) -> Any:
            at, to_read, slot, parity, sums = carry
            part, turn, at_round = at
            if parts > 1:

                @pl.when((turn == 0) & (at_round == 0) & (part > 0))
                def next_part() -> None:
                    ops.barrier()()
                    ops.hold_inputs()(ops.load_inputs()(of_x[0], part * cut.rounds * cut.team), held)
                    ops.barrier()()
                    sum_inputs()

            codes, scales = ops.take()(slots, arrivals, slot, parity, (part * cut.rounds + at_round) * cut.team)
            request(to_read, slot)
            is_first, tile = (at_round == 0).astype(jnp.int32), at_round * cut.team
            sums = ops.multiply()(sums, is_first, codes, scales, held, tile, *input_sums)

            @pl.when(at_round == cut.rounds - 1)
            def unit_done() -> None:
                odd = jax.lax.rem(part * turns + turn, jnp.int32(2))
                before = [*kept, turn] if parts > 1 else []
                finish = ops.finish(has_bias, parts, has_residual)
                finish(sums, partial.at[odd], factors, unit(turn), part, *before, *residual, *y, *biases)

            slot += 1
            parity = jnp.where(slot == cut.slots, 1 - parity, parity)
            return after(at), after(to_read), jnp.where(slot == cut.slots, 0, slot), parity, sums

        sums = jnp.zeros((hopper.WARPGROUP * 4 * ops.blocks_of_tokens,), jnp.float32)
        sums = plgpu.layout_cast(sums, ops.layout["sums"])
        first = ((jnp.int32(0),) * 3, to_read, jnp.int32(0), jnp.int32(0), sums)
        jax.lax.fori_loop(0, parts * cut.rounds * turns, step, first)

    scratch: list[Any] = [
        plgpu.SMEM((m * ops.pitch // 4,), jnp.int32),
        plgpu.SMEM((2, WARPS * sums_size), jnp.float32),
        plgpu.SMEM((cut.slots * WARPS * ops.share_bytes // 4,), jnp.int32),
        plgpu.SMEM((cut.slots * WARPS * 2,), jnp.int32),
    ]
    if cut.raw:
        scratch.append(plgpu.SMEM((ops.input_sums,), jnp.float32))
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

    One token need not be rounded: every block rounds all of it for itself, in the time that its first weights take to
    come.

    Args:
      source: ``[m, k]``, m up to 16; e4m3, or one bf16 row of up to 16384 inputs (the gain of a norm may be float32).
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
        not rounded is no such token.
    """
    m, k = source.arrays()[0].shape
    n = sum(sizes)
    cut = cut or choose_streaming(m, n, k, share_bytes(group_size, scale_dtype))
    if cut is None:
        raise NotImplementedError(f"{m} tokens by {n} outputs by {k} inputs do not suit the kernel for few tokens")
    if not isinstance(source, Rounded) and not rounds_its_input(cut, m, k):
        raise NotImplementedError(f"{m} tokens of {k} inputs are not one token of up to {MAX_TOKEN}")
    has_bias, has_residual = any(bias is not None for bias in biases), residual is not None
    kernel = make_kernel(
        m, sizes, k, group_size, jnp.dtype(scale_dtype), jnp.dtype(out_dtype), has_bias, has_residual, cut, source
    )  # fmt: skip
    beside = [] if residual is None else [residual]
    return tuple(kernel(*source.arrays(), *beside, *tiles, *as_vectors(sizes, tensor_scales, biases)))

"""The INT4 x FP8 matrix product for Hopper, in Pallas:Mosaic GPU.

The kernel computes tiles of yᵀ: weights are the first operand of the tensor core instruction, converted from int4 to
e4m3 in registers, and activations the second, read from shared memory. So it serves one token and many thousands.
``docs/kernels.md`` says what was tried and measured.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.matmul_steps import Operation, Steps
from pallas_kernels.reference import Numerics
from pallas_kernels.stream_steps import Exchange
from pallas_kernels.tiling import BLOCK_N, FLAGS, StreamK, Tiling, plan_rounds, plan_stream
from pallas_kernels.tuned import choose_tiling
from pallas_kernels.weight_layout import TILE_K, TILE_N, tile_shape

LOADED_AT_ONCE = 64  # registers of a thread, of other blocks' sums


def make_kernel(
    m: int,
    sizes: tuple[int, ...],
    k: int,
    group_size: int,
    scale_dtype: Any,
    has_bias: bool,
    t: Tiling,
    has_residual: bool = False,
    out_dtype: Any = jnp.bfloat16,
    folded: bool = False,
) -> Operation:
    """The kernel for one shape: ``(x8, x_scale, *tiles, *tensor_scales [1], *biases [n] if any) -> *y [m, n]``.

    Behind ``x_scale`` comes the residual, if there is one. With ``stream_k`` there are zeros ``[FLAGS]``, int32, as the
    last argument, which the kernel writes, and sums of blocks as the last result.
    """
    ops = Steps(m, sizes, group_size, scale_dtype, t, folded=folded)
    weights = len(sizes)
    steps = -(-k // TILE_K)
    parts = t.split * t.teams
    if parts > 1:  # every part takes as many steps; those behind the last one read zeros
        steps = math.ceil(steps / (parts * t.unroll)) * t.unroll
    ends_of_rows = list(itertools.accumulate(-(-n // t.outputs) for n in sizes))  # counted through all weights
    rows, token_tiles = ends_of_rows[-1], -(-m // t.tokens)
    row_groups = -(-rows // t.share)
    tiles = row_groups * token_tiles
    persistent = t.persistent and parts == 1
    plan = plan_rounds(dataclasses.replace(t, persistent=persistent), rows, token_tiles, steps)
    blocks, steps, part_steps = plan.clusters, plan.steps, plan.part_steps
    stream, exchange = plan_stream(t, tiles, steps) if t.stream_k else None, Exchange(ops)
    if stream is not None:
        blocks, steps = stream.blocks, stream.chains * t.unroll
    counts_vary = stream is not None or plan.divided > 0  # of a block's steps of a tile
    slots_of_team = t.stages // t.teams
    # Steps of a turn of the loop: where a tile begins with the first slot, as many as bring it back there, so that the
    # compiler knows all addresses (without that a sixth of a step's instructions find them). Else those of a chain.
    slots_known = not persistent
    together = math.lcm(slots_of_team, t.unroll) if slots_known else t.unroll
    part = t.tokens // t.share  # tokens of a divided tile whose sums a block adds up
    part_tiling = dataclasses.replace(t, tokens=part, halves=1)
    part_ops = Steps(m, sizes, group_size, scale_dtype, part_tiling, scaled_tokens=t.tokens, folded=folded)
    cluster = t.share * t.split
    at_once = 2 // t.sides  # steps that are copied together

    def of_weight(row: Any) -> tuple[Any, Any]:
        """The weight that a row of blocks belongs to, and its number there."""
        weight, first = jnp.int32(0), jnp.int32(0)
        for end in ends_of_rows[:-1]:
            weight += (row >= end).astype(jnp.int32)
            first = jnp.where(row >= end, end, first)
        return weight, row - first

    def for_weight(weight: Any, do: Callable[[int], None]) -> None:
        """Calls ``do`` with the number of a weight that only the device knows."""
        for i in range(weights):
            if weights == 1:
                do(i)
            else:
                pl.when(weight == i)(functools.partial(do, i))

    # The chain behind which a tile's residual is asked for: not at once, as the last tile's results may still be read.
    asking = min(1, min(steps, part_steps or steps) // t.unroll - 1) if persistent and stream is None else -1

    def body(x: Any, x_scale: Any, *refs: Any) -> None:
        streams = stream is not None
        counts = (has_residual, weights, weights, weights * has_bias, streams, weights, streams)
        ends = itertools.accumulate(counts, initial=0)
        residual, w, tensor_scales, biases, flags, y, sums = (
            refs[start:end] for start, end in itertools.pairwise(ends)
        )
        x_smem, w_smem, y_smem, full, empty, *rest = refs[len(refs) - len(scratch) :]
        residual_here = rest.pop() if has_residual else None
        landing: Any = rest.pop() if t.split > 1 or plan.divided else None
        received: Any = rest.pop() if rest else None
        block, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
        peer = jax.lax.axis_index("peer") if cluster > 1 else jnp.int32(0)
        side, team = jax.lax.rem(warpgroup, jnp.int32(t.sides)), jax.lax.div(warpgroup, jnp.int32(t.sides))
        first_step = peer * (steps * t.teams) if t.split > 1 else 0
        if stream is not None:
            mine = stream.pieces(block)
        elif plan.divided:
            mine = plan.whole + (block < plan.divided).astype(jnp.int32)
        else:
            mine = jax.lax.div(tiles - block + blocks - 1, jnp.int32(blocks))
        if landing is not None:
            ops.open_landing()(landing)
        if cluster > 1:
            hopper.cluster_arrive()

        def is_whole(i: Any) -> Any:
            return i < plan.whole

        def tile_of(i: Any) -> tuple[Any, Any, Any, Any, Any]:
            """Of the block's tile i the rows of outputs and tokens, the first step, how many, and how many before."""
            if stream is not None:
                (group, first, count, before), beside = stream.piece(i, block), 0
            else:
                (group, beside, first, count), before = plan.piece(i, block, peer), i * (steps * t.teams)
            row, token = group, jnp.int32(0)
            if token_tiles > 1:
                row, token = plgpu.planar_snake(group, (row_groups, token_tiles), 1, min(t.snake, token_tiles))
            return row * t.share + (beside if t.share > 1 else 0), token, first, count, before

        def slot_of(step: Any) -> Any:
            """Where a block's step is, counted through all tiles; a team's slots are always the same ones."""
            return jax.lax.rem(step, t.stages)

        def barrier_of(slot: Any) -> Any:
            return slot if at_once == 1 else jax.lax.div(slot, jnp.int32(at_once))

        @pl.when(team == t.teams)
        def produce() -> None:
            if persistent:
                plgpu.set_max_registers(40, action="decrease")
            if t.share > 1:  # the other block's barriers must exist
                hopper.cluster_wait()

            def produce_tile(i: Any, _: None) -> None:
                row, token, first, count, before = tile_of(i)
                weight, row = of_weight(row)

                def produce_step(j: Any, _: None) -> None:
                    s = j * at_once
                    slot, at = slot_of(before + s), first_step + first + s
                    barrier = full.at[barrier_of(slot)]

                    @pl.when(before + s >= t.stages)
                    def reuse() -> None:
                        plgpu.barrier_wait(empty.at[barrier_of(slot)])

                    def copy_tokens(together: str | None) -> None:
                        for u in range(at_once):
                            inputs = x.at[pl.ds(token * t.tokens, t.tokens), pl.ds((at + u) * TILE_K, TILE_K)]
                            plgpu.copy_gmem_to_smem(inputs, x_smem.at[slot + u], barrier, collective_axes=together)

                    together = "peer" if t.share > 1 else None
                    if plan.divided:
                        pl.when(is_whole(i))(functools.partial(copy_tokens, together))
                        pl.when(~is_whole(i))(functools.partial(copy_tokens, None))
                    else:
                        copy_tokens(together)

                    def copy_weight(i: int) -> None:
                        # Two tiles, as copies must be of whole 128 bytes.
                        where = (pl.ds(row * 2, 2), at) if at_once == 1 else (row, pl.ds(at, 2))
                        plgpu.copy_gmem_to_smem(w[i].at[where], w_smem.at[barrier_of(slot)], barrier)

                    for_weight(weight, copy_weight)

                jax.lax.fori_loop(0, count * t.teams // at_once, produce_step, None)

            jax.lax.fori_loop(0, mine, produce_tile, None)
            if t.split > 1:
                hopper.cluster_wait()

        def release(barrier: Any) -> None:
            if t.share > 1:  # one thread arrives for all of them, in both blocks
                hopper.warpgroup_barrier()
            plgpu.barrier_arrive(barrier)

        def compute_tile(i: Any, _: None) -> None:
            row, token, first, count, earlier = tile_of(i)
            weight, row = of_weight(row)
            output = row * t.outputs + side * TILE_N
            first_result = token * t.tokens  # the first token of the results that this block writes
            if plan.divided:
                first_result += jnp.where(is_whole(i), 0, peer * part)
            ends_tile = first + count == steps
            factors = ops.load_factors()(weight, first_result, x_scale, *tensor_scales)

            def ask_for_residual() -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.copy_gmem_to_smem(
                    residual[0].at[pl.ds(first_result, t.tokens), pl.ds(output, TILE_N)], y_smem.at[side],
                    cast(Any, residual_here).at[side],
                )  # fmt: skip

            if has_residual and asking < 0:
                writes = (team == 0) & (peer == 0) if t.share == 1 else team == 0
                if stream is not None:
                    writes = ends_tile
                pl.when(writes)(ask_for_residual)
            ones = plgpu.layout_cast(jnp.ones((256,), jnp.float32), ops.layout["pair"])

            def slot(s: Any, r: int | None) -> Any:
                """Where the team's step s is, if known that of the tile's step r."""
                if r is None:
                    return slot_of(earlier + (s * t.teams + team if t.teams > 1 else s))
                known = r % slots_of_team * t.teams
                return known + team if t.teams > 1 else known

            def barrier_at(s: Any, r: int | None) -> Any:
                if r is None or at_once == 1:
                    return barrier_of(slot(s, r))
                return r % slots_of_team * (t.teams // at_once) + jax.lax.div(team, jnp.int32(at_once))

            def fetch(s: Any, r: int | None, last: Any, ends: bool) -> Any:
                """Operand and scales of the team's step s; behind the last one, where chains end, those of the last."""
                at, barrier = slot(s, r), barrier_at(s, r)
                if ends:
                    exists = s < count
                    pl.when(exists)(lambda: plgpu.barrier_wait(full.at[barrier]))
                    before = None if r is None else r - 1
                    at = jnp.where(exists, at, slot(s - 1, before))
                    barrier = jnp.where(exists, barrier, barrier_at(s - 1, before))
                else:
                    plgpu.barrier_wait(full.at[barrier])
                tile = side if at_once == 1 else jax.lax.rem(at if r is None else team, jnp.int32(2))
                return ops.load_weights()(w_smem.at[barrier], tile, last)

            def chain(s: Any, r: int | None, length: int, carry: Any, ends: bool) -> Any:
                """``length`` steps whose wgmmas overlap; none runs at the end.

                The compiler serialises wgmmas that still run where a loop begins anew, hence chains of several steps.
                """

                def of_round(u: int) -> int | None:
                    return None if r is None else r + u

                operand, ratios, unit, last, accumulators = carry
                accumulators = list(accumulators)
                before = operand
                for u in range(length):
                    tokens = x_smem.at[slot(s + u, of_round(u))]
                    first = jnp.int32(s + u == 0) if not of_round(u) else jnp.int32(0)
                    for group in range(ops.groups):
                        accumulators[0] = ops.multiply(0, group)(accumulators[0], operand, tokens, first)
                        if t.halves == 2:
                            if u or group:
                                accumulators[1] = ops.settle(1, group, 1)(accumulators[1], ratios, before)
                                if group == 0:
                                    release(empty.at[barrier_at(s + u - 1, of_round(u - 1))])
                            accumulators[1] = ops.multiply(1, group)(accumulators[1], operand, tokens, first)
                        following, next_ratios, next_group = operand, ratios, group + 1
                        if group == ops.groups - 1:
                            following, next_ratios, unit, last = fetch(
                                s + u + 1, of_round(u + 1), last, ends=ends and u == length - 1
                            )
                            next_group = 0
                        accumulators[0] = ops.settle(t.halves - 1, next_group, 2)(
                            accumulators[0], next_ratios, operand, following
                        )
                        if t.halves == 1 and group == ops.groups - 1:
                            release(empty.at[barrier_at(s + u, of_round(u))])
                        before, operand, ratios = operand, following, next_ratios
                if t.halves == 2:
                    accumulators[1] = ops.settle(0, 0, 1)(accumulators[1], ratios, before)
                    release(empty.at[barrier_at(s + length - 1, of_round(length - 1))])
                return operand, ratios, unit, last, tuple(accumulators)

            empty_sum = jnp.zeros((hopper.WARPGROUP * ops.registers,), jnp.float32)
            empty_sum = plgpu.layout_cast(empty_sum, ops.layout["accumulator"])
            rest = 0 if stream is not None else steps % together
            turns: Any = jax.lax.div(count, together) if counts_vary else steps // together

            def chains(start: Any, number: int, begin: int, carry: Any, last: bool) -> Any:
                """So many steps from ``start`` on, whose slots begin with the one of the tile's step ``begin``."""
                for at in range(0, number, t.unroll):
                    length = min(t.unroll, number - at)
                    known = begin + at if slots_known else None
                    carry = chain(start + at, known, length, carry, ends=last and at + length == number)
                return carry

            carry = (*fetch(jnp.int32(0), 0 if slots_known else None, ones, False), (empty_sum,) * t.halves)
            carry = chains(jnp.int32(0), rest, 0, carry, last=turns == 0)

            def turn(j: Any, carry: Any) -> Any:
                carry = chains(rest + j * together, together, rest, carry, last=True)
                if has_residual and asking >= 0:
                    pl.when(j == asking)(ask_for_residual)
                return carry

            _, _, unit, _, accumulators = jax.lax.fori_loop(0, turns, turn, carry)

            def write(its: Steps, accumulators: Sequence[Any], unit: Any) -> None:
                """Results of the parts of the tokens whose accumulators ``its`` tile has, from ``first_result`` on."""
                in_bfloat16 = out_dtype == jnp.bfloat16
                if in_bfloat16 and residual_here is None:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                elif in_bfloat16:
                    plgpu.barrier_wait(cast(Any, residual_here).at[side])
                added = [ops.load_bias()(weight, output, *biases)] if has_bias else []
                for h, accumulator in enumerate(accumulators):
                    tokens = first_result + h * its.half
                    done = y_smem.at[side, pl.ds(h * its.half, its.half)]
                    if in_bfloat16:
                        its.store(h, has_bias, has_residual)(accumulator, unit, factors, y_smem.at[side], *added)
                        plgpu.commit_smem()

                    def write_results(
                        i: int, h: int = h, accumulator: Any = accumulator, tokens: Any = tokens, done: Any = done
                    ) -> None:
                        if in_bfloat16:
                            target = y[i].at[pl.ds(tokens, its.half), pl.ds(output, TILE_N)]
                            plgpu.copy_smem_to_gmem(done, target)
                        else:
                            its.store_float32(h, has_bias, sizes[i])(
                                accumulator, unit, factors, tokens, output, y[i], *added
                            )

                    for_weight(weight, write_results)

            def exchange_sums(plan: StreamK) -> None:
                """Of a block with a part of a tile, or all of it."""
                place = block * t.sides + side

                @pl.when(~ends_tile)
                def send() -> None:
                    exchange.send()(place, unit, sums[0], *accumulators)
                    hopper.warpgroup_barrier()
                    exchange.announce()(place, flags[0])

                @pl.when(ends_tile)
                def add() -> None:
                    start = plan.first_block(plan.piece(i, block)[0]) * t.sides + side
                    at_once = max(1, min(plan.senders, LOADED_AT_ONCE // ops.registers))

                    def add_some(j: Any, totals: Any) -> Any:
                        return exchange.add(at_once)(start + j * (at_once * t.sides), place, sums[0], *totals)

                    exchange.wait()(start, place, flags[0])
                    rounds = jax.lax.div(place - start + (at_once * t.sides - 1), jnp.int32(at_once * t.sides))
                    totals = exchange.to_units()(unit, *accumulators)
                    write(ops, jax.lax.fori_loop(0, rounds, add_some, totals), ones)

            if stream is not None:
                exchange_sums(stream)
                return
            if parts == 1:
                if plan.whole:
                    write_whole = functools.partial(write, ops, accumulators, unit)
                    pl.when(is_whole(i))(write_whole) if plan.divided else write_whole()

                def write_part() -> None:
                    # The other blocks are done with what they read, where sums will land.
                    hopper.cluster_arrive()
                    hopper.cluster_wait()
                    ops.send_parts()(side, peer, unit, x_smem.at[0], landing, *accumulators)
                    ops.await_landing()(landing)
                    write(part_ops, [ops.gather_parts()(side, peer, unit, x_smem.at[0], *accumulators)], ones)

                if plan.divided:
                    pl.when(~is_whole(i))(write_part)
                return

            def gathered(accumulators: Any, unit: Any, first: int, senders: int) -> list[Any]:
                return [
                    ops.gather(h, senders)(accumulators[h], unit, received.at[first, side]) for h in range(t.halves)
                ]

            if t.split > 1:
                hopper.cluster_wait()
            if t.teams > 1:

                @pl.when(team > 0)
                def other_team() -> None:
                    for h in range(t.halves):
                        ops.send(h, within_block=True)(accumulators[h], unit, received.at[t.split - 2 + team, side])

                ops.meet()(side)

            def first_team() -> None:
                sums, in_unit = accumulators, unit
                if t.teams > 1:
                    sums, in_unit = gathered(sums, in_unit, t.split - 1, t.teams - 1), ones
                if t.split == 1:
                    write(ops, sums, in_unit)
                    return

                @pl.when(peer > 0)
                def other_block() -> None:
                    for h in range(t.halves):
                        ops.send(h)(sums[h], in_unit, received.at[peer - 1, side], landing)

                @pl.when(peer == 0)
                def leader() -> None:
                    ops.await_landing()(landing)
                    write(ops, gathered(sums, in_unit, 0, t.split - 1), ones)

            if t.teams > 1:
                pl.when(team == 0)(first_team)
            else:
                first_team()

        @pl.when(team < t.teams)
        def compute() -> None:
            if persistent:
                plgpu.set_max_registers(232, action="increase")
            if t.share > 1:
                hopper.cluster_wait()
            jax.lax.fori_loop(0, mine, compute_tile, None)
            plgpu.wait_smem_to_gmem(0)
            if t.share > 1:  # the other block still arrives on this one's barriers
                hopper.cluster_arrive_done()
                hopper.cluster_wait()

    full_barriers = plgpu.Barrier(num_arrivals=at_once + 1, num_barriers=t.stages // at_once)  # of copies
    empty_barriers = plgpu.Barrier(num_arrivals=2, num_barriers=t.stages // at_once)
    shared = plgpu.ClusterBarrier(collective_axes=("peer",), num_arrivals=2, num_barriers=t.stages)
    scratch: list[Any] = [
        plgpu.SMEM((t.stages, t.tokens, TILE_K), jnp.float8_e4m3fn, transforms=ops.swizzle),
        plgpu.SMEM((t.stages // at_once, 2, *tile_shape(group_size, scale_dtype)), jnp.int32),
        plgpu.SMEM((t.sides, t.tokens, TILE_N), jnp.bfloat16, transforms=ops.swizzle),
        full_barriers,
        shared if t.share > 1 else empty_barriers,
    ]
    if parts > 1:
        scratch.append(plgpu.SMEM((t.split + t.teams - 2, t.sides, TILE_N * t.tokens), jnp.float32))
    if t.split > 1 or plan.divided:
        scratch.append(plgpu.SMEM((2,), jnp.int32))
    if has_residual:
        scratch.append(plgpu.Barrier(num_arrivals=1, num_barriers=t.sides))
    outputs = [jax.ShapeDtypeStruct((m, n), out_dtype) for n in sizes]
    if stream is not None:
        outputs.append(jax.ShapeDtypeStruct((blocks * t.sides, t.tokens * TILE_N), jnp.float32))
    cluster_axis: dict[str, Any] = {"cluster": (cluster,), "cluster_names": ("peer",)} if cluster > 1 else {}
    kernel = plgpu.kernel(
        body,
        out_type=tuple(outputs),
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=t.sides * t.teams + 1,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
        kernel_name="int4_matmul",
        **cluster_axis,
    )
    return cast(Operation, kernel)


@functools.partial(jax.jit, static_argnames=("sizes", "group_size", "scale_dtype", "out_dtype", "numerics", "tiling"))
def matmul(
    x8: jax.Array,
    x_scale: jax.Array,
    tiles: Sequence[jax.Array],
    tensor_scales: Sequence[jax.Array],
    biases: Sequence[jax.Array | None],
    residual: jax.Array | None = None,
    flags: jax.Array | None = None,
    *,
    sizes: tuple[int, ...],
    group_size: int,
    scale_dtype: Any,
    out_dtype: Any = jnp.bfloat16,
    numerics: Numerics = "exact",
    tiling: Tiling | None = None,
) -> tuple[jax.Array, ...]:
    """``y[m, n] = x_scale[m] · tensor_scale · Σ_k x8[m, k] · W[n, k] + bias[n]`` of several W.

    Args:
      x8: ``[m, k]`` e4m3.
      x_scale: ``[m]`` float32.
      tiles: int32, per weight what :func:`pallas_kernels.weight_layout.to_tiles` makes of it.
      tensor_scales: per weight, scalar float32.
      biases: per weight ``[n]`` float, or None.
      residual: ``[m, n]`` bf16 that is added to the (rounded) product of the one weight; or None.
      flags: zeros ``[FLAGS]``, int32, that blocks may use to tell each other what is done; made here if None.
      sizes: outputs n of each weight, multiples of 64.
      group_size: 32, 64 or 128, a divisor of k.
      scale_dtype: of the group scales in ``tiles``, e4m3 or bf16.
      out_dtype: bf16, or float32 if there is no residual.
      numerics: "exact" or "folded", see :func:`pallas_kernels.reference.int4_fp8_matmul`.
      tiling: chosen by :func:`choose_tiling` if None.

    Returns:
      Per weight ``[m, n]`` of ``out_dtype``. Sums run in the tensor core's accumulators, which keep fewer bits than
      float32.
    """
    m, k = x8.shape
    if tiling is None:
        rows, columns = tile_shape(group_size, scale_dtype)
        whole_blocks = sum(-(-n // BLOCK_N) * BLOCK_N for n in sizes)
        tiling = choose_tiling(m, whole_blocks, k, 4 * rows * columns)
    has_bias = any(bias is not None for bias in biases)
    has_residual = residual is not None
    kernel = make_kernel(
        m, sizes, k, group_size, jnp.dtype(scale_dtype), has_bias, tiling, has_residual, out_dtype, numerics == "folded"
    )  # fmt: skip
    beside = [] if residual is None else [residual]
    arrays = x8, x_scale, *beside, *tiles, *as_vectors(sizes, tensor_scales, biases)
    if not tiling.stream_k:
        return tuple(kernel(*arrays))
    flags = jnp.zeros((FLAGS,), jnp.int32) if flags is None else flags
    *products, _ = kernel(*arrays, jax.new_ref(flags))
    return tuple(products)


def as_vectors(
    sizes: Sequence[int], tensor_scales: Sequence[jax.Array], biases: Sequence[jax.Array | None]
) -> list[jax.Array]:
    """What the kernels take beside the weights: scales ``[1]`` and, if there is any bias, one ``[n]`` for each."""
    scales = [scale.reshape(1) for scale in tensor_scales]
    if all(bias is None for bias in biases):
        return scales
    zeros = [jnp.zeros((n,), jnp.float32) for n in sizes]
    return scales + [z if bias is None else bias.astype(jnp.float32) for z, bias in zip(zeros, biases, strict=True)]

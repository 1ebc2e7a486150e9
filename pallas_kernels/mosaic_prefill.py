"""FP8 causal attention of prompts on Hopper, in Pallas:Mosaic GPU.

A block takes 128 query rows of a head, 64 for each of two warpgroups; a third one copies keys and values. Blocks of
keys are gone through from the last one that a row sees to the first, so that only the first block taken (behind a
prefix, the first two) has keys to hide. Three stages are in flight in each warpgroup: the tensor core scores the block
after and adds up the values of the block before, while the warpgroup weighs a block (running maximum, ``exp2``, sums).

    tensor core:   scores j+1, values j-1   | scores j+2, values j   | ...
    warpgroup:     weighs j                 | weighs j+1             | ...

Queries are an operand in shared memory, weights one in registers. Scores, their powers and sums are float16, two to a
register, which halves both registers and instructions. The registers of the scores, rounded, are those of the second
product's operand up to the order of bytes, because the values lie in a matching order of keys
(:func:`pallas_kernels.reference_rotation.transpose_values`).
"""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.prefill_steps import ROWS, PrefillShape, Steps
from pallas_kernels.reference import E4M3_MAX, dequantize_int4
from pallas_kernels.reference_rotation import (
    KEY_MAX,
    Cache,
    expand_blocks,
    quantize_blocks,
    restore_values,
    transpose_values,
    write_rows,
)
from pallas_kernels.tiling import STREAMING_MULTIPROCESSORS

WARPGROUPS = 2  # that compute; a third one copies
TILE = WARPGROUPS * ROWS
STAGES = 2  # blocks of keys, of values, and tiles' queries that shared memory holds
# Pairs of blocks of keys whose outputs the tensor core adds up: it cuts off what is below 2^-13 of the sum so far,
# always towards zero. Their sums are added in float32, in shared memory.
HELD_PAIRS = 4


class Tile(NamedTuple):
    """Where a tile of rows lies, and how many blocks of keys it needs: scalars of the device."""

    sequence: Any
    head: Any
    kv_head: Any
    start: Any
    first_row: Any
    count: Any


class State(NamedTuple):
    """What a warpgroup knows between two blocks of keys: containers of registers.

    Attributes:
      scores: of the next block to be weighed.
      spare: registers for scores.
      weights: of the last block that was weighed, as an operand.
      output: of the blocks before that.
      offsets: of the rows' exponents.
      sums: of the weights.
      scales: of the keys and values of the last block that was weighed.
      following: of those of the next one.
      since: what the output was multiplied by since something was held.
    """

    scores: Any
    spare: Any
    weights: Any
    output: Any
    offsets: Any
    sums: Any
    scales: Any
    following: Any
    since: Any


def make_kernel(shape: PrefillShape, softmax_scale: float) -> Operation:
    """``(q8, q_scale, k8, k_scale, values, v_scale, lengths[, starts]) -> [b, t, h, d]`` bf16."""
    ops = Steps(shape, softmax_scale)
    s = shape
    tiles = -(-s.tokens // TILE)
    all_tiles = tiles * s.heads * s.batch
    blocks = min(all_tiles, STREAMING_MULTIPROCESSORS)
    chunks = s.head_dim // 64  # of an output row, 128 bytes each

    def body(
        q8: Any, q_scale: Any, k8: Any, k_scale: Any, values: Any, v_scale: Any, lengths: Any, *refs: Any
    ) -> None:  # fmt: skip
        *starts, y, q_smem, k_smem, v_smem, y_smem, held_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = refs
        block, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
        rounds, rest = divmod(all_tiles, blocks)

        def place_in(turn: Any) -> Any:
            """Every other round goes backwards: who has a long tile of one has a short one of the next."""
            return jnp.where(jax.lax.rem(turn, jnp.int32(2)) == 0, block, blocks - 1 - block)

        mine = rounds + (place_in(jnp.int32(rounds)) < rest).astype(jnp.int32)

        def tile_of(i: Any) -> Tile:
            index = i * blocks + place_in(i)
            head, others = jax.lax.rem(index, jnp.int32(s.heads)), jax.lax.div(index, jnp.int32(s.heads))
            sequence, from_last = jax.lax.rem(others, jnp.int32(s.batch)), jax.lax.div(others, jnp.int32(s.batch))
            # The longest tiles first, so that the last ones are short.
            first_row = (tiles - 1 - from_last) * TILE
            start = starts[0][sequence] if starts else jnp.int32(0)
            last_row = jnp.minimum(first_row + TILE, jnp.maximum(lengths[sequence], 1)) - 1
            count = jax.lax.div(start + last_row, jnp.int32(s.keys)) + 1
            return Tile(sequence, head, jax.lax.div(head, jnp.int32(s.heads // s.kv_heads)), start, first_row, count)

        def slot(number: Any) -> Any:
            """Where a block of keys is, one of values, or a tile's queries; all of a thread block's are counted."""
            return jnp.bitwise_and(number, STAGES - 1)

        @pl.when(warpgroup == WARPGROUPS)
        def produce() -> None:
            plgpu.set_max_registers(24, action="decrease")

            def copy(number: Any, source: Any, target: Any, full: Any, empty: Any) -> None:
                @pl.when(number >= STAGES)
                def reuse() -> None:
                    plgpu.barrier_wait(empty.at[slot(number)])

                plgpu.copy_gmem_to_smem(source, target.at[slot(number)], full.at[slot(number)])

            def copy_keys(tile: Tile, j: Any, number: Any) -> None:
                at = pl.ds((tile.count - 1 - j) * s.keys, s.keys)
                copy(number, k8.at[tile.sequence, at, tile.kv_head], k_smem, k_full, k_empty)

            def begin_tile(i: Any, number: Any) -> None:
                tile, place = tile_of(i), slot(i)

                @pl.when(i >= STAGES)
                def reuse() -> None:
                    plgpu.barrier_wait(q_empty.at[place])

                rows = pl.ds(tile.first_row, TILE)
                plgpu.copy_gmem_to_smem(q8.at[tile.sequence, rows, tile.head], q_smem.at[place], q_full.at[place])
                copy_keys(tile, jnp.int32(0), number)

            def copy_tile(i: Any, done: Any) -> Any:
                tile = tile_of(i)

                def copy_both(j: Any, _: None) -> None:
                    number = done + j

                    @pl.when(j + 1 < tile.count)
                    def next_keys() -> None:
                        copy_keys(tile, j + 1, number + 1)

                    @pl.when((j + 1 == tile.count) & (i + 1 < mine))
                    def next_tile() -> None:
                        begin_tile(i + 1, number + 1)

                    at = pl.ds((tile.count - 1 - j) * s.keys, s.keys)
                    copy(number, values.at[tile.sequence, tile.kv_head, :, at], v_smem, v_full, v_empty)

                jax.lax.fori_loop(0, tile.count, copy_both, None)
                return done + tile.count

            begin_tile(jnp.int32(0), jnp.int32(0))
            jax.lax.fori_loop(0, mine, copy_tile, jnp.int32(0))

        @pl.when(warpgroup < WARPGROUPS)
        def compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            held = held_smem.at[warpgroup]

            def zeros(name: str) -> Any:
                return plgpu.layout_cast(jnp.zeros(ops.type[name].shape, ops.dtype[name]), ops.layout[name])

            def scales_of(tile: Tile, j: Any) -> Any:
                block_of_keys = jnp.maximum(tile.count - 1 - j, 0)
                return ops.load_scales()(k_scale, v_scale, tile.sequence, tile.kv_head, block_of_keys)

            def rows_of(tile: Tile) -> Any:
                row = tile.first_row + warpgroup * ROWS
                return ops.load_rows()(q_scale, lengths, tile.sequence, tile.head, row, tile.start)

            def queries_of(i: Any) -> Any:
                return q_smem.at[slot(i), pl.ds(warpgroup * ROWS, ROWS)]

            def score(into: Any, i: Any, place: Any) -> Any:
                """Of a tile's rows and a block of keys that is there; left to run."""
                return ops.score()(into, queries_of(i), k_smem.at[place])

            def gather(state: State, place: Any) -> Any:
                """The output with the last weighed block's values; left to run."""
                plgpu.barrier_wait(v_full.at[place])
                return ops.gather()(state.output, state.weights, v_smem.at[place])

            def give_back(number: Any, condition: Any) -> None:
                """A block of keys."""

                @pl.when(condition)
                def used() -> None:
                    plgpu.barrier_arrive(k_empty.at[slot(number)])

            def with_held(output: Any, since: Any, times: Any) -> Any:
                """Plus what is held, if something was held a number of times."""
                return jax.lax.fori_loop(
                    0, jnp.minimum(times, 1), lambda _, output: ops.add_held()(output, since, held), output
                )

            def store(output: Any, sums: Any, scales: Any, tile: Tile) -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                ops.store()(output, sums, scales, y_smem.at[warpgroup])
                plgpu.commit_smem()
                rows = pl.ds(tile.first_row + warpgroup * ROWS, ROWS)
                for chunk in range(chunks):
                    plgpu.copy_smem_to_gmem(
                        y_smem.at[warpgroup, chunk], y.at[tile.sequence, rows, tile.head, pl.ds(64 * chunk, 64)]
                    )

            def attend(i: Any, carry: Any) -> Any:
                """A tile, whose first block has been scored, and the next one's first scores."""
                done, scores, rows, in_use, following = carry
                tile = tile_of(i)
                factors, limits = rows

                def step(j: Any, state: State, place: Any, is_last: bool = False) -> State:
                    """Weighs a block that has been scored, beside products with the one after and the one before it."""
                    scores, output = state.spare, gather(state, place)  # what lies between is in the other place
                    if not is_last:
                        plgpu.barrier_wait(k_full.at[place])
                        scores = score(scores, i, place)
                    following = scales_of(tile, j + 1)
                    weights, offsets, sums, shrink, flag = ops.weigh()(
                        state.scores, factors, state.scales, state.following, state.offsets, state.sums, y_smem
                    )
                    scores, output = ops.wait()(scores, output, state.weights)
                    if not is_last:
                        plgpu.barrier_arrive(k_empty.at[place])
                    plgpu.barrier_arrive(v_empty.at[place])
                    weights = ops.as_operand()(weights)
                    output, since = ops.shrink()(output, shrink, flag), ops.grow()(state.since, shrink)
                    return State(
                        scores, state.scores, weights, output, offsets, sums, state.following, following, since
                    )

                # The first block beside the second one's scores. Where there is none they are of whatever is in shared
                # memory, and nobody wants them.
                scores = ops.mask()(scores, limits, (tile.count - 1) * s.keys)

                @pl.when(tile.count > 1)
                def arrived() -> None:
                    plgpu.barrier_wait(k_full.at[slot(done + 1)])

                second = score(zeros("scores"), i, slot(done + 1))
                weights, offsets, sums, *_ = ops.weigh()(
                    scores, factors, in_use, in_use, ops.start()(zeros("pair")), zeros("pair"), y_smem
                )
                second, output = ops.wait()(second, zeros("output"), zeros("weights"))
                give_back(done + 1, tile.count > 1)
                if starts:  # a tile's rows end in two blocks of keys
                    second = ops.mask()(second, limits, (tile.count - 2) * s.keys)
                weights = ops.as_operand()(weights)
                state = State(second, scores, weights, output, offsets, sums, in_use, following, ones)

                count = jnp.maximum(tile.count - 2, 0)  # of blocks that are neither first nor last
                odd, pairs = jnp.bitwise_and(count, 1), jax.lax.shift_right_logical(count, 1)
                places = slot(done), slot(done + 1)
                held_times = jax.lax.div(jnp.maximum(pairs - 1, 0), jnp.int32(HELD_PAIRS))

                def pair(n: Any, state: State) -> State:
                    for k, place in enumerate(places):
                        state = step(1 + 2 * n + k, state, place)
                    return state

                def some_pairs(part: Any, state: State) -> State:
                    begin = part * HELD_PAIRS
                    state = jax.lax.fori_loop(begin, jnp.minimum(begin + HELD_PAIRS, pairs), pair, state)

                    def hold(_: Any, state: State) -> State:
                        ops.hold()(with_held(state.output, state.since, part), held)
                        return state._replace(output=zeros("output"), since=ones)

                    return jax.lax.fori_loop(0, (part < held_times).astype(jnp.int32), hold, state)

                state = jax.lax.fori_loop(0, held_times + 1, some_pairs, state)
                end, more = done + tile.count, i + 1 < mine
                state = jax.lax.fori_loop(0, odd, lambda _, state: step(tile.count - 2, state, slot(end - 1)), state)
                state = jax.lax.fori_loop(
                    0, (tile.count > 1).astype(jnp.int32),
                    lambda _, state: step(tile.count - 1, state, slot(end), is_last=True), state,
                )  # fmt: skip

                # The last values beside the next tile's first scores.
                plgpu.barrier_arrive(q_empty.at[slot(i)])

                @pl.when(more)
                def next_arrived() -> None:
                    plgpu.barrier_wait(q_full.at[slot(i + 1)])
                    plgpu.barrier_wait(k_full.at[slot(end)])

                following_tile = tile_of(jnp.minimum(i + 1, mine - 1))
                rows, *next_scales = rows_of(following_tile), scales_of(following_tile, 0), scales_of(following_tile, 1)
                scores = score(zeros("scores"), i + 1, slot(end))
                output = gather(state, slot(end - 1))
                scores, output = ops.wait()(scores, output, state.weights)
                plgpu.barrier_arrive(v_empty.at[slot(end - 1)])
                give_back(end, more)
                store(with_held(output, state.since, held_times), state.sums, state.scales, tile)
                return end, scores, rows, *next_scales

            ones = plgpu.layout_cast(jnp.ones(ops.type["pair"].shape, jnp.float32), ops.layout["pair"])
            zero = jnp.int32(0)
            first = tile_of(zero)
            plgpu.barrier_wait(q_full.at[0])
            plgpu.barrier_wait(k_full.at[0])
            scores, _ = ops.wait()(score(zeros("scores"), zero, 0), zeros("output"), zeros("weights"))
            plgpu.barrier_arrive(k_empty.at[0])
            carry = (zero, scores, rows_of(first), scales_of(first, 0), scales_of(first, 1))
            jax.lax.fori_loop(0, mine, attend, carry)
            plgpu.wait_smem_to_gmem(0)

    copied, used = plgpu.Barrier(num_barriers=STAGES), plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((s.batch, s.tokens, s.heads, s.head_dim), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((STAGES, TILE, s.head_dim), jnp.float8_e4m3fn, transforms=ops.key_swizzle),
            plgpu.SMEM((STAGES, s.keys, s.head_dim), jnp.float8_e4m3fn, transforms=ops.key_swizzle),
            plgpu.SMEM((STAGES, s.head_dim, s.keys), jnp.float8_e4m3fn, transforms=ops.value_swizzle),
            plgpu.SMEM((WARPGROUPS, chunks, ROWS, 64), jnp.bfloat16, transforms=ops.output_swizzle),
            plgpu.SMEM((WARPGROUPS, s.head_dim * ROWS), jnp.float32),
            *[copied, used] * 3,
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
        kernel_name="prefill_attention",
    )
    return cast(Operation, kernel)


@functools.partial(jax.jit, static_argnames=("softmax_scale",))
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
) -> jax.Array:
    """:func:`pallas_kernels.reference_attention.prefill_attention`, a prefix rounded from int4 to e4m3.

    Args:
      q8: ``[b, t, h, d]`` e4m3, up to ``QUERY_MAX``; d is 64 or 128.
      q_scale: ``[b, t, h]`` float32.
      k8: ``[b, t, kv, d]`` e4m3, up to ``KEY_MAX``.
      k_scale: ``[b, kv, blocks of keys]`` float32.
      v8: ``[b, kv, d, t']`` e4m3, transposed.
      v_scale: as k_scale.
      lengths: ``[b]`` int32.
      prefix: int4 keys and values before the new tokens, or None.
      prefix_lengths: ``[b]`` int32, given exactly when ``prefix`` is.
      softmax_scale: usually ``d ** -0.5``.

    Returns:
      ``[b, t, h, d]`` bf16.
    """
    b, t, h, d = q8.shape
    shape = PrefillShape(b, t, h, k8.shape[2], d)
    keys = (k8, k_scale, v8, v_scale)
    starts = []
    if prefix is not None and prefix_lengths is not None:
        shape = dataclasses.replace(shape, cached=prefix[0].shape[2])
        keys, starts = behind_prefix(*keys, lengths, prefix, prefix_lengths), [prefix_lengths]
    return cast(jax.Array, make_kernel(shape, softmax_scale)(q8, q_scale, *keys, lengths, *starts))


def behind_prefix(
    k8: jax.Array,
    k_scale: jax.Array,
    v8: jax.Array,
    v_scale: jax.Array,
    lengths: jax.Array,
    prefix: Cache,
    prefix_lengths: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Keys and values of the prefix and, without a gap, of the new tokens, rounded to e4m3 block by block.

    A block then may hold both, and a scale serves them; new ones are rounded a second time.
    """
    t, slots = k8.shape[1], prefix[0].shape[2]

    def join(new: jax.Array, codes: jax.Array, scales: jax.Array, largest: float) -> tuple[jax.Array, jax.Array]:
        old = jnp.where((jnp.arange(slots) < prefix_lengths[:, None])[:, None], scales.astype(jnp.float32), 0)
        old = dequantize_int4(codes, old[..., None])
        room = jnp.pad(old, ((0, 0), (0, 0), (0, t), (0, 0)))
        return quantize_blocks(write_rows(room, new, prefix_lengths, lengths).swapaxes(1, 2), largest)

    keys, key_scale = join(k8.astype(jnp.float32) * expand_blocks(k_scale, t), *prefix[:2], KEY_MAX)
    values = restore_values(v8, t).astype(jnp.float32) * expand_blocks(v_scale, t)
    values, value_scale = join(values, *prefix[2:], E4M3_MAX)
    return keys, key_scale, transpose_values(values), value_scale

"""FP8 causal attention of prompts on Hopper, in Pallas:Mosaic GPU.

A block takes 128 query rows of a head, 64 for each of two warpgroups; a third one copies keys and values. Blocks of
keys are gone through from the last one that a row sees to the first, so that only the first block taken (behind a
prefix, the first two) has keys to hide. While a warpgroup weighs one block's scores (running maximum, ``exp2``, sums),
the tensor core adds up the values of the block before for it, and works for the other warpgroup.

Queries and weights are register operands. The scores' registers become those of the weights as they are, because the
values lie in a matching order of keys (:func:`pallas_kernels.reference.transpose_values`).
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
from pallas_kernels.reference import (
    Cache,
    dequantize_int4,
    expand_blocks,
    quantize_blocks,
    restore_values,
    transpose_values,
    write_rows,
)
from pallas_kernels.tiling import STREAMING_MULTIPROCESSORS

WARPGROUPS = 2  # that compute; a third one copies
TILE = WARPGROUPS * ROWS
STAGES = 3
# Blocks of keys whose outputs the tensor core adds up: it cuts off what is below 2^-13 of the sum so far, always
# towards zero. Their sums are added in float32, in shared memory.
HELD_BLOCKS = 8


class Tile(NamedTuple):
    """Where a tile of rows lies, and how many blocks of keys it needs: scalars of the device."""

    sequence: Any
    head: Any
    kv_head: Any
    start: Any
    first_row: Any
    count: Any


def make_kernel(shape: PrefillShape, softmax_scale: float, stages: int) -> Operation:
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
            """Where a block of keys is, or one of values; all of a thread block's are counted."""
            return jax.lax.rem(number, jnp.int32(stages))

        @pl.when(warpgroup == WARPGROUPS)
        def produce() -> None:
            plgpu.set_max_registers(24, action="decrease")

            def copy(number: Any, source: Any, target: Any, full: Any, empty: Any) -> None:
                @pl.when(number >= stages)
                def reuse() -> None:
                    plgpu.barrier_wait(empty.at[slot(number)])

                plgpu.copy_gmem_to_smem(source, target.at[slot(number)], full.at[slot(number)])

            def copy_keys(tile: Tile, j: Any, number: Any) -> None:
                at = pl.ds((tile.count - 1 - j) * s.keys, s.keys)
                copy(number, k8.at[tile.sequence, at, tile.kv_head], k_smem, k_full, k_empty)

            def begin_tile(i: Any, number: Any) -> None:
                tile = tile_of(i)

                @pl.when(i > 0)
                def reuse() -> None:
                    plgpu.barrier_wait(q_empty)

                rows = pl.ds(tile.first_row, TILE)
                plgpu.copy_gmem_to_smem(q8.at[tile.sequence, rows, tile.head], q_smem, q_full)
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

            def zeros(name: str, dtype: Any = jnp.float32) -> Any:
                return plgpu.layout_cast(jnp.zeros(ops.type[name].shape, dtype), ops.layout[name])

            def scales(tile: Tile, j: Any) -> Any:
                block_of_keys = jnp.maximum(tile.count - 1 - j, 0)
                return ops.load_scales()(k_scale, v_scale, tile.sequence, tile.kv_head, block_of_keys)

            def begin(tile: Tile) -> Any:
                row = tile.first_row + warpgroup * ROWS
                queries = ops.load_queries()(q_smem.at[pl.ds(warpgroup * ROWS, ROWS)])
                plgpu.barrier_arrive(q_empty)
                rows = ops.load_rows()(q_scale, lengths, tile.sequence, tile.head, row, tile.start)
                return queries, *rows, scales(tile, 0), scales(tile, 1)

            def issue(scores: Any, output: Any, queries: Any, weights: Any, number: Any) -> tuple[Any, Any]:
                """The products with a block of keys that is there, and with the values of the block before."""
                scores = ops.score()(scores, queries, k_smem.at[slot(number)])
                plgpu.barrier_wait(v_full.at[slot(number - 1)])
                return scores, ops.gather()(output, weights, v_smem.at[slot(number - 1)])

            def weigh_first(tile: Tile, scores: Any, factors: Any, limits: Any, in_use: Any) -> Any:
                """Of a tile's last keys, which its rows do not all see: ``(weights in float32, maxima, sums)``."""
                scores = ops.mask()(scores, limits, (tile.count - 1) * s.keys)
                scores, maxima, sums, *_ = ops.weigh()(
                    scores, factors, in_use, in_use, ops.start()(zeros("pair")), zeros("pair"), y_smem
                )
                return scores, maxima, sums

            def attend(i: Any, carry: Any) -> Any:
                """A tile, whose first scores have been weighed, and the first scores of the next one."""
                tile, done, scores, weights, maxima, sums, queries, factors, limits, in_use, following = carry

                def step(j: Any, carry: Any, some_hidden: bool = False) -> Any:
                    scores, weights, output, maxima, sums, before, now, since = carry
                    number = done + j
                    plgpu.barrier_wait(k_full.at[slot(number)])
                    scores, output = issue(scores, output, queries, weights, number)
                    following = scales(tile, j + 1)
                    scores = ops.wait("scores", 1)(scores, queries, weights)
                    plgpu.barrier_arrive(k_empty.at[slot(number)])
                    if some_hidden:
                        scores = ops.mask()(scores, limits, (tile.count - 1 - j) * s.keys)
                    scores, maxima, sums, shrink, flag = ops.weigh()(scores, factors, before, now, maxima, sums, y_smem)
                    output = ops.wait("output", 0)(output, queries, weights)
                    plgpu.barrier_arrive(v_empty.at[slot(number - 1)])
                    rounded = ops.round_weights()(scores)
                    output, since = ops.shrink()(output, shrink, flag), ops.grow()(since, shrink)
                    return scores, rounded, output, maxima, sums, now, following, since

                ones = plgpu.layout_cast(jnp.ones(ops.type["pair"].shape, jnp.float32), ops.layout["pair"])
                held = held_smem.at[warpgroup]
                carry = (scores, weights, zeros("output"), maxima, sums, in_use, following, ones)
                unmasked = jnp.int32(1)
                if starts:  # a tile's rows end in two blocks of keys
                    unmasked = jnp.minimum(tile.count, 2)
                    carry = jax.lax.fori_loop(1, unmasked, functools.partial(step, some_hidden=True), carry)
                held_times = jax.lax.div(jnp.maximum(tile.count - unmasked - 1, 0), jnp.int32(HELD_BLOCKS))

                def with_held(output: Any, since: Any, times: Any) -> Any:
                    """Plus what is held, if something was held a number of times."""
                    return jax.lax.fori_loop(
                        0, jnp.minimum(times, 1), lambda _, output: ops.add_held()(output, since, held), output
                    )

                def some_blocks(part: Any, carry: Any) -> Any:
                    begin = unmasked + part * HELD_BLOCKS
                    end = jnp.minimum(begin + HELD_BLOCKS, tile.count)
                    carry = jax.lax.fori_loop(begin, end, step, carry)

                    def hold(_: Any, carry: Any) -> Any:
                        *state, since = carry
                        ops.hold()(with_held(state[2], since, part), held)
                        state[2] = zeros("output")
                        return *state, ones

                    return jax.lax.fori_loop(0, (part < held_times).astype(jnp.int32), hold, carry)

                carry = jax.lax.fori_loop(0, held_times + 1, some_blocks, carry)
                scores, weights, output, _, sums, last_scales, _, since = carry

                # The next tile's first scores beside this one's last values. Behind the last tile they are of whatever
                # is in shared memory, and nobody wants them.
                done, more = done + tile.count, i + 1 < mine
                following_tile = tile_of(jnp.minimum(i + 1, mine - 1))

                @pl.when(more)
                def arrived() -> None:
                    plgpu.barrier_wait(q_full)
                    plgpu.barrier_wait(k_full.at[slot(done)])

                queries, factors, limits, in_use, following = begin(following_tile)
                scores, output = issue(scores, output, queries, weights, done)
                scores = ops.wait("scores", 1)(scores, queries, weights)
                plgpu.barrier_arrive(k_empty.at[slot(done)])
                scores, maxima, next_sums = weigh_first(following_tile, scores, factors, limits, in_use)
                output = ops.wait("output", 0)(output, queries, weights)
                plgpu.barrier_arrive(v_empty.at[slot(done - 1)])
                output = with_held(output, since, held_times)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                ops.store()(output, sums, last_scales, y_smem.at[warpgroup])
                plgpu.commit_smem()
                rows = pl.ds(tile.first_row + warpgroup * ROWS, ROWS)
                for chunk in range(chunks):
                    plgpu.copy_smem_to_gmem(
                        y_smem.at[warpgroup, chunk], y.at[tile.sequence, rows, tile.head, pl.ds(64 * chunk, 64)]
                    )
                weights = ops.round_weights()(scores)
                state = (scores, weights, maxima, next_sums, queries, factors, limits, in_use, following)
                return following_tile, done, *state

            first_tile = tile_of(jnp.int32(0))
            plgpu.barrier_wait(q_full)
            queries, factors, limits, in_use, following = begin(first_tile)
            plgpu.barrier_wait(k_full.at[0])
            scores = ops.score()(zeros("scores"), queries, k_smem.at[0])
            scores = ops.wait("scores", 0)(scores, queries, zeros("weights", jnp.int32))
            plgpu.barrier_arrive(k_empty.at[0])
            scores, maxima, sums = weigh_first(first_tile, scores, factors, limits, in_use)
            weights = ops.round_weights()(scores)
            state = (scores, weights, maxima, sums, queries, factors, limits, in_use, following)
            jax.lax.fori_loop(0, mine, attend, (first_tile, jnp.int32(0), *state))
            plgpu.wait_smem_to_gmem(0)

    copied, used = plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((s.batch, s.tokens, s.heads, s.head_dim), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((TILE, s.head_dim), jnp.float8_e4m3fn, transforms=ops.key_swizzle),
            plgpu.SMEM((stages, s.keys, s.head_dim), jnp.float8_e4m3fn, transforms=ops.key_swizzle),
            plgpu.SMEM((stages, s.head_dim, s.keys), jnp.float8_e4m3fn, transforms=ops.value_swizzle),
            plgpu.SMEM((WARPGROUPS, chunks, ROWS, 64), jnp.bfloat16, transforms=ops.output_swizzle),
            plgpu.SMEM((WARPGROUPS, s.head_dim * ROWS), jnp.float32),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            copied,
            used,
            copied,
            used,
        ],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
        kernel_name="prefill_attention",
    )
    return cast(Operation, kernel)


@functools.partial(jax.jit, static_argnames=("softmax_scale", "stages"))
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
    stages: int = STAGES,
) -> jax.Array:
    """:func:`pallas_kernels.reference.prefill_attention`, a prefix rounded from int4 to e4m3.

    Args:
      q8: ``[b, t, h, d]`` e4m3; d is 64 or 128.
      q_scale: ``[b, t, h]`` float32.
      k8: ``[b, t, kv, d]`` e4m3.
      k_scale: ``[b, kv, blocks of keys]`` float32.
      v8: ``[b, kv, d, t']`` e4m3, transposed.
      v_scale: as k_scale.
      lengths: ``[b]`` int32.
      prefix: int4 keys and values before the new tokens, or None.
      prefix_lengths: ``[b]`` int32, given exactly when ``prefix`` is.
      softmax_scale: usually ``d ** -0.5``.
      stages: blocks of keys and of values that shared memory holds.

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
    return cast(jax.Array, make_kernel(shape, softmax_scale, stages)(q8, q_scale, *keys, lengths, *starts))


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

    def join(new: jax.Array, codes: jax.Array, scales: jax.Array) -> tuple[jax.Array, jax.Array]:
        old = jnp.where((jnp.arange(slots) < prefix_lengths[:, None])[:, None], scales.astype(jnp.float32), 0)
        old = dequantize_int4(codes, old[..., None])
        room = jnp.pad(old, ((0, 0), (0, 0), (0, t), (0, 0)))
        return quantize_blocks(write_rows(room, new, prefix_lengths, lengths).swapaxes(1, 2))

    keys, key_scale = join(k8.astype(jnp.float32) * expand_blocks(k_scale, t), *prefix[:2])
    values = restore_values(v8, t).astype(jnp.float32) * expand_blocks(v_scale, t)
    values, value_scale = join(values, *prefix[2:])
    return keys, key_scale, transpose_values(values), value_scale

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
from typing import Any, cast

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

WARPGROUPS = 2  # that compute; a third one copies
TILE = WARPGROUPS * ROWS
STAGES = 3


def make_kernel(shape: PrefillShape, softmax_scale: float, stages: int) -> Operation:
    """``(q8, q_scale, k8, k_scale, values, v_scale, lengths[, starts]) -> [b, t, h, d]`` bf16."""
    ops = Steps(shape, softmax_scale)
    s = shape
    tiles = -(-s.tokens // TILE)
    chunks = s.head_dim // 64  # of an output row, 128 bytes each

    def body(
        q8: Any, q_scale: Any, k8: Any, k_scale: Any, values: Any, v_scale: Any, lengths: Any, *refs: Any
    ) -> None:  # fmt: skip
        *starts, y, k_smem, v_smem, y_smem, k_full, k_empty, v_full, v_empty = refs
        block, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
        head, rest = jax.lax.rem(block, jnp.int32(s.heads)), jax.lax.div(block, jnp.int32(s.heads))
        sequence, from_last = jax.lax.rem(rest, jnp.int32(s.batch)), jax.lax.div(rest, jnp.int32(s.batch))
        # The longest tiles first, so that the last blocks to run are short.
        first_row = (tiles - 1 - from_last) * TILE
        kv_head = jax.lax.div(head, jnp.int32(s.heads // s.kv_heads))
        start = starts[0][sequence] if starts else jnp.int32(0)
        last_row = jnp.minimum(first_row + TILE, jnp.maximum(lengths[sequence], 1)) - 1
        count = jax.lax.div(start + last_row, jnp.int32(s.keys)) + 1

        @pl.when(warpgroup == WARPGROUPS)
        def produce() -> None:
            plgpu.set_max_registers(24, action="decrease")

            def copy(i: Any, source: Any, target: Any, full: Any, empty: Any) -> None:
                slot = jax.lax.rem(i, jnp.int32(stages))

                @pl.when(i >= stages)
                def reuse() -> None:
                    plgpu.barrier_wait(empty.at[slot])

                plgpu.copy_gmem_to_smem(source, target.at[slot], full.at[slot])

            def copy_keys(i: Any) -> None:
                at = pl.ds((count - 1 - i) * s.keys, s.keys)
                copy(i, k8.at[sequence, at, kv_head], k_smem, k_full, k_empty)

            def copy_both(i: Any, _: None) -> None:
                @pl.when(i + 1 < count)
                def next_keys() -> None:
                    copy_keys(i + 1)

                at = pl.ds((count - 1 - i) * s.keys, s.keys)
                copy(i, values.at[sequence, kv_head, :, at], v_smem, v_full, v_empty)

            copy_keys(jnp.int32(0))
            jax.lax.fori_loop(0, count, copy_both, None)

        @pl.when(warpgroup < WARPGROUPS)
        def compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            row = first_row + warpgroup * ROWS
            queries, factors, limits = ops.load_queries()(q8, q_scale, lengths, sequence, head, row, start)

            def zeros(name: str) -> Any:
                return plgpu.layout_cast(jnp.zeros(ops.type[name].shape, jnp.float32), ops.layout[name])

            def slot(i: Any) -> Any:
                return jax.lax.rem(i, jnp.int32(stages))

            def scales(i: Any) -> Any:
                return ops.load_scales()(k_scale, v_scale, sequence, kv_head, jnp.maximum(count - 1 - i, 0))

            plgpu.barrier_wait(k_full.at[0])
            no_weights = plgpu.layout_cast(jnp.zeros(ops.type["weights"].shape, jnp.int32), ops.layout["weights"])
            in_use, following = scales(0), scales(1)
            scores = ops.score()(zeros("scores"), queries, k_smem.at[0])
            scores = ops.wait("scores", 0)(scores, queries, no_weights)
            plgpu.barrier_arrive(k_empty.at[0])
            scores = ops.mask()(scores, limits, (count - 1) * s.keys)
            rounded, maxima, sums, _ = ops.weigh()(
                scores, factors, in_use, in_use, ops.start()(zeros("pair")), zeros("pair"), y_smem
            )
            weights = ops.round_weights()(rounded)

            def step(i: Any, carry: Any, some_hidden: bool = False) -> Any:
                scores, weights, output, maxima, sums, before, now = carry
                plgpu.barrier_wait(k_full.at[slot(i)])
                scores = ops.score()(scores, queries, k_smem.at[slot(i)])
                plgpu.barrier_wait(v_full.at[slot(i - 1)])
                output = ops.gather()(output, weights, v_smem.at[slot(i - 1)])
                following = scales(i + 1)
                scores = ops.wait("scores", 1)(scores, queries, weights)
                plgpu.barrier_arrive(k_empty.at[slot(i)])
                if some_hidden:
                    scores = ops.mask()(scores, limits, (count - 1 - i) * s.keys)
                scores, maxima, sums, shrink = ops.weigh()(scores, factors, before, now, maxima, sums, y_smem)
                output = ops.wait("output", 0)(output, queries, weights)
                plgpu.barrier_arrive(v_empty.at[slot(i - 1)])
                return scores, ops.round_weights()(scores), ops.shrink()(output, shrink), maxima, sums, now, following

            carry = (rounded, weights, zeros("output"), maxima, sums, in_use, following)
            unmasked = jnp.int32(1)
            if starts:  # a tile's rows end in two blocks of keys
                unmasked = jnp.minimum(count, 2)
                carry = jax.lax.fori_loop(1, unmasked, functools.partial(step, some_hidden=True), carry)
            _, weights, output, _, sums, last_scales, _ = jax.lax.fori_loop(unmasked, count, step, carry)
            plgpu.barrier_wait(v_full.at[slot(count - 1)])
            output = ops.gather()(output, weights, v_smem.at[slot(count - 1)])
            output = ops.wait("output", 0)(output, queries, weights)
            ops.store()(output, sums, last_scales, y_smem.at[warpgroup])
            plgpu.commit_smem()
            for chunk in range(chunks):
                plgpu.copy_smem_to_gmem(
                    y_smem.at[warpgroup, chunk], y.at[sequence, pl.ds(row, ROWS), head, pl.ds(64 * chunk, 64)]
                )
            plgpu.wait_smem_to_gmem(0)

    copied, used = plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((s.batch, s.tokens, s.heads, s.head_dim), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((stages, s.keys, s.head_dim), jnp.float8_e4m3fn, transforms=ops.key_swizzle),
            plgpu.SMEM((stages, s.head_dim, s.keys), jnp.float8_e4m3fn, transforms=ops.value_swizzle),
            plgpu.SMEM((WARPGROUPS, chunks, ROWS, 64), jnp.bfloat16, transforms=ops.output_swizzle),
            copied,
            used,
            copied,
            used,
        ],
        grid=(tiles * s.heads * s.batch,),
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

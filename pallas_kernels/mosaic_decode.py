"""Attention of a few new tokens to the INT4 cache on Hopper, in Pallas:Mosaic GPU.

Per sequence and kv head up to 16 query rows (new tokens x query heads of the kv head) attend to every slot up to their
position. The slots are cut into splits, one per block; inside a block its four or eight warps take tiles of 32 slots in
turns, each with a running maximum, sum and output of its own. A warp has its tiles copied to slots of its own in shared
memory, one ahead, and waits for no other warp before the end. The warps' results are merged in shared memory; those of
the splits, if there are several, in a cluster's, a block for every so manieth query row, or by a second kernel, a block
per query row.

Products are ``mma.sync`` m16n8k16 in float32: key codes with queries (e4m3; both exact in float16), and value codes
(exact in bf16) with ``exp(score - max) · v_scale``, rounded to bf16. Codes are the first operand, of 16 rows, because
there are more slots, and more elements of a head, than query rows. Which element of a head a lane's codes belong to
follows from how codes lie in memory; queries are permuted to match, outputs permuted back.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.decode_steps import DecodeShape, Steps
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.merge_steps import AT_ONCE, MergeSteps
from pallas_kernels.tiling import DECODE_TILE, DecodeCut, choose_decode_cut


def make_kernel(shape: DecodeShape, softmax_scale: float, out_dtype: Any) -> Operation:
    """``(q8, q_scale, k codes, k scales, v codes, v scales, positions) -> results``: ``y``, or those of splits.

    These are what :func:`make_combine` takes; one split, or those of a cluster, have no need for it.
    """
    ops = Steps(shape, softmax_scale)
    merge = MergeSteps(ops, out_dtype)
    s, cut = shape, shape.cut
    pairs = s.batch * s.kv_heads
    stride = cut.warps * DECODE_TILE

    def body(
        q8: Any, q_scale: Any, k: Any, k_scales: Any, v: Any, v_scales: Any, positions: Any, results: Any, shared: Any,
        arrivals: Any, *parts: Any,
    ) -> None:  # fmt: skip
        if cut.clustered:
            hopper.cluster_arrive()
            pair, split = jax.lax.axis_index("pair"), jax.lax.axis_index("split")
        else:
            block = jax.lax.axis_index("block")
            split, pair = jax.lax.rem(block, jnp.int32(cut.splits)), jax.lax.div(block, jnp.int32(cut.splits))
        sequence, kv_head = jax.lax.div(pair, jnp.int32(s.kv_heads)), jax.lax.rem(pair, jnp.int32(s.kv_heads))
        ops.slots.open()(arrivals)
        warp = ops.slots.warp()()

        def request(at: Any, slot: Any, stop: Any, *read: Any) -> None:
            """The warps' tiles from a slot of the cache on, up to ``stop``."""
            arrays, where = (k, k_scales, v, v_scales), (sequence, kv_head, slot, at, stop)
            ops.request(reads=bool(read))(warp, shared, arrivals, *arrays, *where, *read)

        if cut.splits == 1:  # before it is known how long the sequence is; slots behind its end may be anything
            for i in range(cut.depth):
                request(jnp.int32(i * stride), jnp.int32(i), jnp.int32(s.slots))
        end = functools.reduce(jnp.maximum, (positions[sequence, i] for i in range(s.tokens))) + 1
        # Splits take equal numbers of whole rounds of the sequence as long as it is now.
        rounds = jax.lax.div(end + stride - 1, jnp.int32(stride))
        each = jax.lax.div(rounds + cut.splits - 1, jnp.int32(cut.splits))
        first = split * each
        mine = jnp.maximum(jnp.minimum(each, rounds - first), 0)
        if cut.splits == 1:  # what was asked for must have come before the memory serves for something else
            mine = jnp.maximum(mine, cut.depth)
        else:
            for i in range(cut.depth):  # before the queries, whose conversion waits for them
                request((first + i) * stride, jnp.int32(i), jnp.where(i < mine, end, 0))
        of_rows = ops.load_queries()(q8, q_scale, positions, sequence, kv_head)

        def step(i: Any, carry: Any) -> Any:
            state, slot, parity = carry
            keys = ops.take_keys()(warp, shared, arrivals, slot, parity)
            state, weights = ops.weigh()(state, keys, *of_rows, (first + i) * stride, end)
            values = ops.take_values()(warp, shared, slot)
            later = i + cut.depth
            request((first + later) * stride, slot, jnp.where(later < mine, end, 0), weights, values)
            state = ops.add_values()(state, weights, values)
            slot += 1
            parity = jnp.where(slot == cut.depth, 1 - parity, parity)
            return state, jnp.where(slot == cut.depth, 0, slot), parity

        zeros = jnp.zeros(ops.type["state"].shape, jnp.float32)
        state = ops.start()(plgpu.layout_cast(zeros, ops.layout["state"]))
        state, _, _ = jax.lax.fori_loop(0, mine, step, (state, jnp.int32(0), jnp.int32(0)))
        if not cut.clustered:
            merge.merge_warps()(state, shared, results, block, sequence, kv_head)
            return
        hopper.cluster_wait()  # all blocks are at work: their shared memory exists
        merge.merge_warps()(state, shared, *parts, split, sequence, kv_head)
        hopper.cluster_arrive_done()
        hopper.cluster_wait()
        merge.merge_parts()(*parts, results, split, sequence, kv_head)

    scratch = [plgpu.SMEM((s.shared_words,), jnp.int32), plgpu.SMEM((2 * cut.warps * cut.depth,), jnp.int32)]
    blocks: dict[str, Any] = {"grid": (pairs * cut.splits,), "grid_names": ("block",)}
    result = _result_type(shape, out_dtype)
    if cut.clustered:
        scratch.append(plgpu.SMEM((merge.words_of_parts,), jnp.float32))
        blocks = {"grid": (pairs,), "grid_names": ("pair",), "cluster": (cut.splits,), "cluster_names": ("split",)}
    elif cut.splits > 1:
        result = jax.ShapeDtypeStruct((pairs * cut.splits, s.rows, s.pitch), jnp.float32)
    kernel = plgpu.kernel(
        body,
        out_type=result,
        scratch_types=scratch,
        num_threads=cut.warps // 4,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
        kernel_name="decode_attention",
        **blocks,
    )
    return cast(Operation, kernel)


def _result_type(shape: DecodeShape, out_dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.heads, shape.head_dim), out_dtype)


def make_combine(shape: DecodeShape, out_dtype: Any) -> Operation:
    """The kernel that merges the splits' results: ``partial -> [b, t, h, d]``, a block per row."""
    ops = MergeSteps(Steps(shape, 1.0), out_dtype)

    def body(partial: Any, y: Any) -> None:
        row = jax.lax.axis_index("row")
        zeros = jnp.zeros(ops.row_type.shape, jnp.float32)
        state = ops.start()(plgpu.layout_cast(zeros, ops.row))
        state = jax.lax.fori_loop(
            0, -(-shape.cut.splits // AT_ONCE), lambda i, state: ops.collect()(state, partial, row, i * AT_ONCE), state
        )
        ops.finish()(state, y, row)

    kernel = plgpu.kernel(
        body,
        out_type=_result_type(shape, out_dtype),
        grid=(shape.batch * shape.kv_heads * shape.rows,),
        grid_names=("row",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
        kernel_name="merge_splits",
    )
    return cast(Operation, kernel)


@functools.partial(jax.jit, static_argnames=("softmax_scale", "out_dtype", "cut"))
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
    cut: DecodeCut | None = None,
) -> jax.Array:
    """:func:`pallas_kernels.reference_attention.decode_attention` for up to 16 query rows per kv head.

    Args:
      q8: ``[b, t, h, d]`` e4m3; d is 64 or 128, and t times the query heads of a kv head at most 16.
      q_scale: ``[b, t, h]`` float32.
      k_codes: ``[b, kv, s, d / 2]`` uint8, s a multiple of 8.
      k_scales: ``[b, kv, s]`` bf16.
      v_codes: as k_codes.
      v_scales: as k_scales.
      query_positions: ``[b, t]`` int32.
      softmax_scale: usually ``d ** -0.5``.
      out_dtype: bf16 or float32.
      cut: how the cache is cut into pieces; chosen by :func:`choose_decode_cut` if None.

    Returns:
      ``[b, t, h, d]`` ``out_dtype``.
    """
    b, t, h, d = q8.shape
    kv, slots = k_codes.shape[1:3]
    cut = cut or choose_decode_cut(b, kv, d, slots)
    shape = DecodeShape(b, t, h, kv, d, slots, cut)
    results = make_kernel(shape, softmax_scale, out_dtype)(
        q8, q_scale, k_codes, k_scales, v_codes, v_scales, query_positions
    )
    return results if cut.splits == 1 or cut.clustered else make_combine(shape, out_dtype)(results)

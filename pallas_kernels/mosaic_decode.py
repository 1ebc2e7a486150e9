"""Attention of a few new tokens to the INT4 cache on Hopper, in Pallas:Mosaic GPU.

Per sequence and kv head up to 16 query rows (new tokens x query heads of the kv head) attend to every slot up to their
position. The slots are cut into splits, one per block; inside a block its four warps take every fourth tile of 32
slots, straight from memory into registers and one tile ahead, each with a running maximum, sum and output of its own.
The warps' results are merged in shared memory, those of the splits by a second kernel, a block per query row.

Products are ``mma.sync`` m16n8k16 in float32: queries (e4m3, exact in float16) with key codes (exact in float16), and
``exp(score - max) · v_scale``, rounded to bf16, with value codes (exact in bf16). Which element of a head a lane's
codes belong to follows from how codes lie in memory; queries are permuted to match, outputs permuted back.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.decode_steps import AT_ONCE, ROWS, TILE, WARPS, DecodeShape, Steps, choose_splits
from pallas_kernels.matmul_steps import Operation


def make_kernel(shape: DecodeShape, softmax_scale: float) -> Operation:
    """``(q8, q_scale, k codes, k scales, v codes, v scales, positions) -> partial results``."""
    ops = Steps(shape, softmax_scale)
    pairs = shape.batch * shape.kv_heads
    stride = WARPS * TILE

    def body(
        q8: Any, q_scale: Any, k: Any, k_scales: Any, v: Any, v_scales: Any, positions: Any, partial: Any, shared: Any
    ) -> None:  # fmt: skip
        block = jax.lax.axis_index("block")
        split, pair = jax.lax.rem(block, jnp.int32(shape.splits)), jax.lax.div(block, jnp.int32(shape.splits))
        sequence = jax.lax.div(pair, jnp.int32(shape.kv_heads))
        kv_head = jax.lax.rem(pair, jnp.int32(shape.kv_heads))
        end = functools.reduce(jnp.maximum, (positions[sequence, i] for i in range(shape.tokens))) + 1
        # Splits take equal numbers of whole rounds of the sequence as long as it is now.
        rounds = jax.lax.div(end + stride - 1, jnp.int32(stride))
        each = jax.lax.div(rounds + shape.splits - 1, jnp.int32(shape.splits))
        first = split * each
        mine = jnp.maximum(jnp.minimum(each, rounds - first), 0)

        def fetch(i: Any) -> Any:
            """The tile of round i, or zeros behind the last one."""
            stop = jnp.where(i < mine, end, 0)
            return ops.fetch()(k, k_scales, v, v_scales, sequence, kv_head, (first + i) * stride, stop)

        def step(i: Any, carry: Any) -> Any:
            state, tile = carry
            following = fetch(i + 1)
            return ops.attend()(state, tile, queries, factors, limits, (first + i) * stride), following

        tile = fetch(jnp.int32(0))  # before the queries, whose conversion waits for them
        queries, factors, limits = ops.load_queries()(q8, q_scale, positions, sequence, kv_head)
        count = 4 + 4 * (shape.head_dim // 8)
        state = plgpu.layout_cast(jnp.zeros((hopper.WARPGROUP * count,), jnp.float32), ops.layout["state"])
        state = ops.start("state", 2)(state)
        state, _ = jax.lax.fori_loop(0, mine, step, (state, tile))
        ops.merge()(state, shared, partial, block)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((pairs * shape.splits, ROWS, shape.head_dim + 2), jnp.float32),
        scratch_types=[plgpu.SMEM((WARPS * ROWS * (shape.head_dim + 2),), jnp.float32)],
        grid=(pairs * shape.splits,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
        kernel_name="decode_attention",
    )
    return cast(Operation, kernel)


def make_combine(shape: DecodeShape, out_dtype: Any) -> Operation:
    """The kernel that merges the splits' results: ``partial -> [b, t, h, d]``, a block per row."""
    ops = Steps(shape, 1.0)

    def body(partial: Any, y: Any) -> None:
        row = jax.lax.axis_index("row")
        zeros = jnp.zeros((hopper.WARPGROUP * 3,), jnp.float32)
        state = ops.start("row", 1)(plgpu.layout_cast(zeros, ops.layout["row"]))
        state = jax.lax.fori_loop(
            0, -(-shape.splits // AT_ONCE), lambda i, state: ops.collect()(state, partial, row, i * AT_ONCE), state
        )
        ops.finish_row(out_dtype)(state, y, row)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.heads, shape.head_dim), out_dtype),
        grid=(shape.batch * shape.kv_heads * shape.rows,),
        grid_names=("row",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
        kernel_name="merge_splits",
    )
    return cast(Operation, kernel)


@functools.partial(jax.jit, static_argnames=("softmax_scale", "out_dtype", "splits"))
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
    splits: int | None = None,
) -> jax.Array:
    """:func:`pallas_kernels.reference.decode_attention` for up to 16 query rows per kv head.

    Args:
      q8: ``[b, t, h, d]`` e4m3; d is 64 or 128, and t times the query heads of a kv head at most 16.
      q_scale: ``[b, t, h]`` float32.
      k_codes: ``[b, kv, s, d / 2]`` uint8, s even.
      k_scales: ``[b, kv, s]`` bf16.
      v_codes: as k_codes.
      v_scales: as k_scales.
      query_positions: ``[b, t]`` int32.
      softmax_scale: usually ``d ** -0.5``.
      out_dtype: bf16 or float32.
      splits: blocks that share a sequence's slots; chosen by :func:`choose_splits` if None.

    Returns:
      ``[b, t, h, d]`` ``out_dtype``.
    """
    b, t, h, d = q8.shape
    kv, slots = k_codes.shape[1:3]
    splits = choose_splits(b, kv, slots) if splits is None else splits
    shape = DecodeShape(b, t, h, kv, d, slots, splits)
    kernel = make_kernel(shape, softmax_scale)
    partial = kernel(q8, q_scale, k_codes, k_scales, v_codes, v_scales, query_positions)
    return make_combine(shape, out_dtype)(partial)

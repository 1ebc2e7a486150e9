"""What comes between the projections and decode attention, in one kernel of Pallas:Mosaic GPU.

Queries are rotated, scaled, mixed and rounded to e4m3; keys the same, but to int4 and into the cache, and values into
the cache, in place. A warp takes a head of a token. XLA needs more than a dozen kernels for it.
"""

from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.append_steps import WARPS, AppendShape, Steps
from pallas_kernels.matmul_steps import Operation

Cache = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def make_kernel(shape: AppendShape, scaled: bool, mixed: bool) -> Operation:
    """The kernel for one shape, whose references to the cache are written to."""
    s, ops = shape, Steps(shape)
    m = s.batch * s.tokens
    query_blocks, key_blocks = -(-m * s.heads // WARPS), -(-m * s.kv_heads // WARPS)

    def body(
        q: Any, k: Any, v: Any, cos: Any, sin: Any, scale: Any, offset: Any, starts: Any,
        lengths: Any, k_codes: Any, k_scales: Any, v_codes: Any, v_scales: Any, q8: Any, q_scale: Any,
    ) -> None:  # fmt: skip
        block = jax.lax.axis_index("block")

        def rotated(x: Any, heads: int, operation: Literal["times", "over"], first: Any) -> Any:
            values = ops.rotate(heads)(ops.load(heads)(x, first), cos, sin, first)
            return ops.combine(heads, operation)(values, scale, first) if scaled else values

        @pl.when(block < query_blocks)
        def queries() -> None:
            first = block * WARPS
            values = rotated(q, s.heads, "times", first)
            ops.store_queries()(ops.mix()(values) if mixed else values, q8, q_scale, first)

        @pl.when((block >= query_blocks) & (block < query_blocks + key_blocks))
        def keys() -> None:
            first = (block - query_blocks) * WARPS
            values = rotated(k, s.kv_heads, "over", first)
            if mixed:
                values = ops.mix()(ops.combine(s.kv_heads, "minus")(values, offset, first))
            ops.store_codes()(values, k_codes, k_scales, starts, lengths, first)

        @pl.when(block >= query_blocks + key_blocks)
        def values() -> None:
            first = (block - query_blocks - key_blocks) * WARPS
            ops.store_codes()(ops.load(s.kv_heads)(v, first), v_codes, v_scales, starts, lengths, first)

    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((s.batch, s.tokens, s.heads, s.head_dim), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((s.batch, s.tokens, s.heads), jnp.float32),
        ),
        grid=(query_blocks + 2 * key_blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
        kernel_name="rotate_and_append",
    )
    return cast(Operation, kernel)


@jax.jit
def rotate_and_append(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: Cache,
    starts: jax.Array,
    lengths: jax.Array,
    *,
    scale: jax.Array | None = None,
    key_offset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Cache]:
    """:func:`pallas_kernels.reference.rotate_and_append` of bf16 heads of 64 or 128 channels."""
    b, t, h, d = q.shape
    kv, slots = k.shape[2], cache[0].shape[2]
    kernel = make_kernel(AppendShape(b, t, h, kv, d, slots), scale is not None, key_offset is not None)
    tables = [jnp.zeros((1,), jnp.float32) if table is None else table for table in (scale, key_offset)]
    refs = [jax.new_ref(x) for x in cache]
    q8, q_scale = kernel(q, k, v, cos, sin, *tables, starts, lengths, *refs)
    k_codes, k_scales, v_codes, v_scales = (jax.freeze(ref) for ref in refs)
    return q8, q_scale, (k_codes, k_scales, v_codes, v_scales)

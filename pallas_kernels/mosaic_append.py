"""What comes between the projections and attention, in one kernel of Pallas:Mosaic GPU.

Queries are rotated, scaled, mixed and rounded to e4m3; keys the same, but to int4 and into the cache, and values into
the cache, in place. Eight or 16 lanes take a head of a token. For a prompt's own attention keys and values are rounded
to e4m3, too: a block takes 128 tokens of a head, which share a scale, and goes through them twice. XLA needs more than
a dozen kernels for it.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.append_steps import WARPS, AppendShape, BlockSteps, Steps
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.reference import E4M3_MAX, KEY_MAX, SCALE_TOKENS, Cache
from pallas_kernels.tiling import STREAMING_MULTIPROCESSORS

QUERIES = 8  # units of queries that the same lanes take, one after another, where a prompt has enough of them


def make_kernel(shape: AppendShape, scaled: bool, mixed: bool, prompt: bool) -> Operation:
    """The kernel for one shape, whose references to the cache are written to.

    Its results are queries and their scales; of a prompt, also keys, their scales, values and their scales.
    """
    s, ops = shape, Steps(shape)
    m = s.batch * s.tokens
    each = QUERIES if prompt and m * s.heads >= QUERIES * s.units * STREAMING_MULTIPROCESSORS else 1
    query_blocks = -(-m * s.heads // (s.units * each))
    tiles = BlockSteps(shape)
    key_blocks = s.batch * s.kv_heads * tiles.blocks if prompt else -(-m * s.kv_heads // s.units)

    def body(
        q: Any, k: Any, v: Any, cos: Any, sin: Any, scale: Any, offset: Any, starts: Any,
        lengths: Any, k_codes: Any, k_scales: Any, v_codes: Any, v_scales: Any, q8: Any, q_scale: Any, *of_prompt: Any,
    ) -> None:  # fmt: skip
        k8, k8_scale, v8, v8_scale, scratch, tile = of_prompt if prompt else (None,) * 6
        # Long blocks run first.
        block = jax.lax.axis_index("block")
        key_block, query_block = jax.lax.rem(block, jnp.int32(key_blocks)), block - 2 * key_blocks

        def rotated(
            values: Any, steps: Steps, heads: int, operation: Literal["times", "over"], first: Any
        ) -> Any:  # fmt: skip
            values = steps.rotate(heads)(values, cos, sin, first)
            return steps.combine(heads, operation)(values, scale, first) if scaled else values

        def key(steps: Steps, values: Any, first: Any) -> Any:
            values = rotated(values, steps, s.kv_heads, "over", first)
            if not mixed:
                return values
            return steps.mix()(steps.combine(s.kv_heads, "minus")(values, offset, first))

        def value(_steps: Steps, values: Any, _first: Any) -> Any:
            return values

        def for_units(
            count: int, first_of: Callable[[Any], Any], load: Callable[[Any], Any], do: Callable[..., Any], carry: Any
        ) -> Any:
            """``carry = do(values, first unit, carry)`` group by group; the next values are loaded meanwhile."""

            def step(i: Any, state: Any) -> Any:
                values, carry = state
                following = load(first_of(jnp.minimum(i + 1, count - 1)))
                return following, do(values, first_of(i), carry)

            if count == 1:
                return do(load(first_of(0)), first_of(0), carry)
            return jax.lax.fori_loop(0, count, step, (load(first_of(0)), carry))[1]

        @pl.when(query_block >= 0)
        def queries() -> None:
            def store(values: Any, first: Any, _: None) -> None:
                values = rotated(values, ops, s.heads, "times", first)
                ops.store_queries()(ops.mix()(values) if mixed else values, q8, q_scale, first)

            def first(i: Any) -> Any:
                return (query_block * each + i) * s.units

            for_units(each, first, lambda unit: ops.load(s.heads)(q, unit), store, None)

        def take(
            x: Any, make: Any, codes: Any, code_scales: Any, scales: Any, largest: float, store: Any, target: Any
        ) -> None:  # fmt: skip
            """Appends what ``make`` makes of a block's units; of a prompt, also stores it over a common scale."""
            steps = tiles if prompt else ops

            def load(unit: Any) -> Any:
                return steps.load(s.kv_heads)(x, unit)

            def append(values: Any, first: Any, peak: Any) -> Any:
                values = make(steps, values, first)
                steps.store_codes()(values, codes, code_scales, starts, lengths, first)
                return tiles.peak()(tiles.keep_real()(values, lengths, first), peak) if prompt else peak

            if not prompt:
                unit = key_block * s.units
                append(load(unit), unit, None)
                return

            def first(i: Any) -> Any:
                return key_block * SCALE_TOKENS + i * s.units

            nothing = plgpu.layout_cast(jnp.zeros((hopper.WARPGROUP,), jnp.float32), tiles.single_layout)
            peak = for_units(SCALE_TOKENS // s.units, first, load, append, nothing)
            shared = tiles.share_scale(largest)(peak, scales, scratch, key_block)

            def again(values: Any, first: Any, _: None) -> None:
                store()(tiles.keep_real()(make(tiles, values, first), lengths, first), shared, target, first)

            for_units(SCALE_TOKENS // s.units, first, load, again, None)

        @pl.when(block < key_blocks)
        def keys() -> None:
            take(k, key, k_codes, k_scales, k8_scale, KEY_MAX, tiles.store_keys, k8)

        @pl.when((block >= key_blocks) & (query_block < 0))
        def values() -> None:
            take(v, value, v_codes, v_scales, v8_scale, E4M3_MAX, tiles.hold_values, tile)
            if prompt:
                tiles.write_values()(tile, v8, key_block)

    e4m3 = jnp.float8_e4m3fn
    results = [((s.batch, s.tokens, s.heads, s.head_dim), e4m3), ((s.batch, s.tokens, s.heads), jnp.float32)]
    shared_memory: list[Any] = []
    if prompt:
        padded, scales = tiles.blocks * SCALE_TOKENS, ((s.batch, s.kv_heads, tiles.blocks), jnp.float32)
        results += [((s.batch, s.tokens, s.kv_heads, s.head_dim), e4m3), scales]
        results += [((s.batch, s.kv_heads, s.head_dim, padded), e4m3), scales]
        shared_memory = [
            plgpu.SMEM((WARPS,), jnp.float32), plgpu.SMEM((s.head_dim * SCALE_TOKENS // 4,), jnp.int32)
        ]  # fmt: skip
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results),
        scratch_types=shared_memory,
        grid=(query_blocks + 2 * key_blocks,),
        grid_names=("block",),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
        kernel_name="rotate_and_round" if prompt else "rotate_and_append",
    )
    return cast(Operation, kernel)


@functools.partial(jax.jit, static_argnames=("prompt",))
def rotate(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: Cache,
    starts: jax.Array,
    lengths: jax.Array,
    *,
    prompt: bool,
    scale: jax.Array | None = None,
    key_offset: jax.Array | None = None,
) -> tuple[tuple[jax.Array, ...], Cache]:
    """Rotated and rounded bf16 heads of 64 or 128 channels, and the cache with keys and values in it.

    The first results are those of :func:`pallas_kernels.reference.rotate_and_round` if ``prompt``, and else the queries
    of :func:`pallas_kernels.reference.rotate_and_append`.
    """
    b, t, h, d = q.shape
    kv, slots = k.shape[2], cache[0].shape[2]
    kernel = make_kernel(AppendShape(b, t, h, kv, d, slots), scale is not None, key_offset is not None, prompt)
    tables = [jnp.zeros((1,), jnp.float32) if table is None else table for table in (scale, key_offset)]
    refs = [jax.new_ref(x) for x in cache]
    results = kernel(q, k, v, cos, sin, *tables, starts, lengths, *refs)
    k_codes, k_scales, v_codes, v_scales = (jax.freeze(ref) for ref in refs)
    return results, (k_codes, k_scales, v_codes, v_scales)

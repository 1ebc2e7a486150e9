"""What comes between the projections and attention, in one kernel of Pallas:Mosaic GPU.

Queries are rotated, scaled, mixed and rounded to e4m3; keys the same, but to int4 and into the cache, and values into
the cache, in place. Eight or 16 lanes take a head of a token. For a prompt's own attention keys and values are rounded
to e4m3, too: a block takes 128 tokens of a head, which share a scale, and holds them in shared memory until it is
known. XLA needs more than a dozen kernels for it.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.append_steps import AppendShape, BlockSteps, Container, Steps
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.reference import E4M3_MAX, KEY_MAX, SCALE_TOKENS, Cache
from pallas_kernels.tiling import STREAMING_MULTIPROCESSORS

WARPS = 4  # of a block
QUERIES = 8  # that lanes take at most, one after another


def warps_of_prompt(head_dim: int, tables: bool) -> int:
    """Of a block: as many as let a multiprocessor hold the most, by registers or by shared memory for a block's keys.

    With tables of scales or offsets a thread has more than 64 registers, so that two blocks of 16 warps do not fit.
    """
    return 16 if head_dim == 128 and not tables else 8


def queries_of_block(groups: int, others: int, warps: int) -> int:
    """How many groups of queries a block takes: so many that all blocks run in as few rounds as with the most."""
    at_once = (2 if warps == 16 else 3) * STREAMING_MULTIPROCESSORS
    rounds = -(-(others + -(-groups // QUERIES)) // at_once)
    return min(QUERIES, -(-groups // (rounds * at_once - others)))


def zeros(of: Container) -> Any:
    """A container of them."""
    return plgpu.layout_cast(jnp.zeros(of.type.shape, of.dtype), of.layout)


def make_kernel(shape: AppendShape, scaled: bool, mixed: bool, prompt: bool) -> Operation:
    """The kernel for one shape, whose references to the cache are written to.

    Its results are queries and their scales; of a prompt, also keys, their scales, values and their scales.
    """
    s, ops = shape, Steps(shape)
    m = s.batch * s.tokens
    tiles = BlockSteps(shape)
    key_blocks = s.batch * s.kv_heads * tiles.blocks if prompt else -(-m * s.kv_heads // s.units)
    groups = -(-m * s.heads // s.units)  # of units of queries that a block holds at once
    each = queries_of_block(groups, 2 * key_blocks, s.warps) if prompt else 1
    query_blocks = -(-groups // each)

    def body(
        q: Any, k: Any, v: Any, cos: Any, sin: Any, scale: Any, offset: Any, starts: Any,
        lengths: Any, k_codes: Any, k_scales: Any, v_codes: Any, v_scales: Any, q8: Any, q_scale: Any, *of_prompt: Any,
    ) -> None:  # fmt: skip
        k8, k8_scale, v8, v8_scale, scratch, held = of_prompt if prompt else (None,) * 6
        # A block of keys, some of queries, a block of values, some of queries: one kind waits for memory, the other for
        # its instructions. What queries there are more come last.
        block, period = jax.lax.axis_index("block"), 1 + query_blocks // (2 * key_blocks)
        turn, place = jax.lax.div(block, jnp.int32(period)), jax.lax.rem(block, jnp.int32(period))
        of_queries = (place > 0) | (turn >= 2 * key_blocks)
        query_block = block - jnp.minimum(turn + 1, 2 * key_blocks)
        key_block, of_values = jax.lax.div(turn, jnp.int32(2)), jax.lax.rem(turn, jnp.int32(2)) == 1
        if prompt:  # blocks are counted along a head's tokens; those of the same tokens run together
            rest, head = jax.lax.div(key_block, jnp.int32(s.kv_heads)), jax.lax.rem(key_block, jnp.int32(s.kv_heads))
            sequence, number = jax.lax.div(rest, jnp.int32(tiles.blocks)), jax.lax.rem(rest, jnp.int32(tiles.blocks))
            key_block = (sequence * s.kv_heads + head) * tiles.blocks + number

        def rotated(
            values: Any, steps: Steps, heads: int, operation: Literal["times", "over"], first: Any
        ) -> Any:  # fmt: skip
            values = steps.rotate(heads)(values, cos, sin, first)
            return steps.combine(heads, operation)(values, scale, first) if scaled else values

        def key(steps: Steps, words: Any, first: Any) -> Any:
            values = rotated(steps.widen()(words), steps, s.kv_heads, "over", first)
            if not mixed:
                return values
            return steps.mix()(steps.combine(s.kv_heads, "minus")(values, offset, first))

        def for_units(
            count: int, first_of: Callable[[Any], Any], load: Callable[[Any], Any], do: Callable[..., Any], carry: Any
        ) -> Any:
            """``carry = do(words, number, carry)`` group by group; the next words are loaded meanwhile."""

            def step(i: Any, state: Any) -> Any:
                words, carry = state
                i = ops.opaque()(i)
                following = load(first_of(jnp.minimum(i + 1, count - 1)))
                return following, do(words, i, carry)

            if count == 1:
                return do(load(first_of(jnp.int32(0))), jnp.int32(0), carry)
            return jax.lax.fori_loop(0, ops.opaque()(jnp.int32(count)), step, (load(first_of(0)), carry))[1]

        @pl.when(of_queries)
        def queries() -> None:
            def first(i: Any) -> Any:
                return (query_block * each + i) * s.units

            def store(words: Any, i: Any, _: None) -> None:
                values = rotated(ops.widen()(words), ops, s.heads, "times", first(i))
                ops.store_queries()(ops.mix()(values) if mixed else values, q8, q_scale, first(i))

            for_units(each, first, lambda unit: ops.load(s.heads)(q, unit), store, None)

        def append(steps: Steps, x: Any, values: Any, first: Any, peak: Any) -> Any:
            codes, scales = (k_codes, k_scales) if x is k else (v_codes, v_scales)
            return steps.store_codes()(values, codes, scales, starts, lengths, first, peak)

        def take(x: Any) -> None:
            """Appends a block's units, keys or values."""
            unit = key_block * s.units
            words = ops.load(s.kv_heads)(x, unit)
            append(ops, x, key(ops, words, unit) if x is k else ops.widen()(words), unit, zeros(ops.single))

        def take_tokens(x: Any, scales: Any, largest: float, store: Callable[..., None]) -> None:
            """Appends a block's tokens, keys or values of a prompt, and stores them over a common scale.

            ``store`` is given values, one over the scale, and the first unit's number.
            """
            of = tiles.values if x is k else tiles.words  # that are held

            def first(i: Any) -> Any:
                return key_block * SCALE_TOKENS + i * s.units

            def floats(container: Any) -> Any:
                return container if x is k else tiles.widen()(container)

            def append_and_hold(words: Any, i: Any, peak: Any) -> Any:
                made = key(tiles, words, first(i)) if x is k else words
                real = tiles.keep_real(of)(made, lengths, first(i))
                tiles.hold(of)(real, held, i)
                return append(tiles, x, floats(real), first(i), peak)

            def round_held(i: Any, _: None) -> None:
                i = ops.opaque()(i)
                store(floats(tiles.held(of)(held, i)), factor, first(i))

            count = SCALE_TOKENS // s.units
            peak = for_units(
                count, first, lambda unit: tiles.load(s.kv_heads)(x, unit), append_and_hold, zeros(tiles.single)
            )
            factor = tiles.share_scale(largest)(peak, scales, scratch, key_block)
            jax.lax.fori_loop(0, ops.opaque()(jnp.int32(count)), round_held, None)

        @pl.when(jnp.logical_not(of_queries | of_values))
        def keys() -> None:
            if prompt:
                take_tokens(k, k8_scale, KEY_MAX, lambda *made: tiles.store_keys()(*made[:2], k8, made[2]))
            else:
                take(k)

        @pl.when(jnp.logical_not(of_queries) & of_values)
        def values() -> None:
            if prompt:
                take_tokens(v, v8_scale, E4M3_MAX, lambda *made: tiles.hold_values()(*made[:2], held, made[2]))
                tiles.write_values()(held, v8, key_block)
            else:
                take(v)

    e4m3 = jnp.float8_e4m3fn
    results = [((s.batch, s.tokens, s.heads, s.head_dim), e4m3), ((s.batch, s.tokens, s.heads), jnp.float32)]
    shared_memory: list[Any] = []
    if prompt:
        padded, scales = tiles.blocks * SCALE_TOKENS, ((s.batch, s.kv_heads, tiles.blocks), jnp.float32)
        results += [((s.batch, s.tokens, s.kv_heads, s.head_dim), e4m3), scales]
        results += [((s.batch, s.kv_heads, s.head_dim, padded), e4m3), scales]
        shared_memory = [
            plgpu.SMEM((s.warps,), jnp.float32), plgpu.SMEM((s.head_dim * SCALE_TOKENS,), jnp.float32)
        ]  # fmt: skip
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results),
        scratch_types=shared_memory,
        grid=(query_blocks + 2 * key_blocks,),
        grid_names=("block",),
        num_threads=s.warps // 4,
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
    warps = warps_of_prompt(d, tables=scale is not None or key_offset is not None) if prompt else WARPS
    kernel = make_kernel(AppendShape(b, t, h, kv, d, slots, warps), scale is not None, key_offset is not None, prompt)
    tables = [jnp.zeros((1,), jnp.float32) if table is None else table for table in (scale, key_offset)]
    refs = [jax.new_ref(x) for x in cache]
    results = kernel(q, k, v, cos, sin, *tables, starts, lengths, *refs)
    k_codes, k_scales, v_codes, v_scales = (jax.freeze(ref) for ref in refs)
    return results, (k_codes, k_scales, v_codes, v_scales)

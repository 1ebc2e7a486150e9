"""What comes between the projections and attention, in one kernel of Pallas:Mosaic GPU.

Queries are rotated, scaled, mixed and rounded to e4m3; keys the same, but to int4 and into the cache, and values into
the cache, in place. Eight or 16 lanes take a head of a token. For a prompt's own attention keys and values are rounded
to e4m3, too: a block takes 128 tokens of a head, which share a scale, and holds them in shared memory until it is
known. XLA needs more than a dozen kernels for it.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.append_block_steps import BlockSteps
from pallas_kernels.append_steps import AppendShape, Steps
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.reference_rotation import SCALE_TOKENS, Cache
from pallas_kernels.tiling import STREAMING_MULTIPROCESSORS

WARPS = 4  # of a block
HEADS_OF_LANES = 8  # query heads of a token, at most


def warps_of_prompt(head_dim: int, mixed: bool) -> int:
    """Of a block: as many as let a multiprocessor hold the most, by registers or by shared memory for a block's keys.

    What mixes has more than 64 registers in a thread, so that two blocks of 16 warps do not fit.
    """
    return 16 if head_dim == 128 and not mixed else 8


def blocks_at_once(s: AppendShape) -> int:
    """Of a prompt's, that the device holds: three that mix, of up to 80 registers, and else 32 warps' worth."""
    return (3 if s.mixed else 32 // s.warps) * STREAMING_MULTIPROCESSORS


def heads_of_lanes(s: AppendShape, others: int) -> int:
    """How many of a token's query heads the same lanes take.

    ``HEADS_OF_LANES`` or, if they then have as many parts, fewer; fewer, too, if all blocks still run at once, beside
    ``others`` of keys and values.
    """
    candidates = [-(-s.heads // -(-s.heads // each)) for each in range(1, HEADS_OF_LANES + 1)]
    at_once = blocks_at_once(s)
    return next((each for each in candidates if others + query_blocks(s, each) <= at_once), candidates[-1])


def query_blocks(s: AppendShape, each: int) -> int:
    """Blocks of queries, if the same lanes take so many heads."""
    return -(-s.batch * s.tokens * -(-s.heads // each) // s.units)


def make_kernel(s: AppendShape, prompt: bool) -> Operation:
    """The kernel for one shape, whose references to the cache are written to.

    Its results are queries and their scales; of a prompt, also keys, their scales, values and their scales.
    """
    ops, tiles = Steps(s), BlockSteps(s)
    key_blocks = s.batch * s.kv_heads * tiles.blocks if prompt else -(-s.batch * s.tokens * s.kv_heads // s.units)
    each = heads_of_lanes(s, 2 * key_blocks) if prompt else 1
    of_queries = query_blocks(s, each)
    # Blocks of queries stand between those of keys and of values, because one kind waits for memory, the other for its
    # instructions. In few rounds, and where instructions are many, it is better that the short ones come last.
    few = of_queries + 2 * key_blocks <= 2 * blocks_at_once(s)
    period = 1 if few or s.mixed else 1 + of_queries // (2 * key_blocks)

    def body(
        q: Any, k: Any, v: Any, cos: Any, sin: Any, scale: Any, offset: Any, starts: Any,
        lengths: Any, k_codes: Any, k_scales: Any, v_codes: Any, v_scales: Any, q8: Any, q_scale: Any, *of_prompt: Any,
    ) -> None:  # fmt: skip
        # Every so manieth block is one of keys or, in turns, values. What queries there are more come last.
        block = jax.lax.axis_index("block")
        turn, place = jax.lax.div(block, jnp.int32(period)), jax.lax.rem(block, jnp.int32(period))
        takes_queries = (place > 0) | (turn >= 2 * key_blocks)
        query_block = block - jnp.minimum(turn + 1, 2 * key_blocks)
        key_block, takes_values = jax.lax.div(turn, jnp.int32(2)), jax.lax.rem(turn, jnp.int32(2)) == 1
        if prompt:  # blocks are counted along a head's tokens; those of the same tokens run together
            rest, head = jax.lax.div(key_block, jnp.int32(s.kv_heads)), jax.lax.rem(key_block, jnp.int32(s.kv_heads))
            sequence, number = jax.lax.div(rest, jnp.int32(tiles.blocks)), jax.lax.rem(rest, jnp.int32(tiles.blocks))
            key_block = (sequence * s.kv_heads + head) * tiles.blocks + number
        k_cache, v_cache, where = (k_codes, k_scales), (v_codes, v_scales), (starts, lengths)

        @pl.when(takes_queries)
        def queries() -> None:
            room = of_prompt[-1:]  # of a prompt what its keys and values are held in
            ops.queries(each, prompt)(q, cos, sin, scale, q8, q_scale, *room, query_block * s.units)

        @pl.when(jnp.logical_not(takes_queries | takes_values))
        def keys() -> None:
            if prompt:
                k8, k8_scale, _, _, scratch, held = of_prompt
                tiles.keys()(k, cos, sin, scale, offset, *k_cache, *where, k8, k8_scale, scratch, held, key_block)
            else:
                ops.append("keys")(k, cos, sin, scale, offset, *k_cache, *where, key_block * s.units)

        @pl.when(jnp.logical_not(takes_queries) & takes_values)
        def values() -> None:
            if prompt:
                _, _, v8, v8_scale, scratch, held = of_prompt
                tiles.values()(v, *v_cache, *where, v8, v8_scale, scratch, held, key_block)
            else:
                ops.append("values")(v, cos, sin, scale, offset, *v_cache, *where, key_block * s.units)

    e4m3 = jnp.float8_e4m3fn
    results = [((s.batch, s.tokens, s.heads, s.head_dim), e4m3), ((s.batch, s.tokens, s.heads), jnp.float32)]
    shared_memory: list[Any] = []
    if prompt:
        padded, scales = tiles.blocks * SCALE_TOKENS, ((s.batch, s.kv_heads, tiles.blocks), jnp.float32)
        results += [((s.batch, s.tokens, s.kv_heads, s.head_dim), e4m3), scales]
        results += [((s.batch, s.kv_heads, s.head_dim, padded), e4m3), scales]
        shared_memory = [
            plgpu.SMEM((s.warps + 2 * s.head_dim,), jnp.float32), plgpu.SMEM((s.head_dim * SCALE_TOKENS,), jnp.float32)
        ]  # fmt: skip
    kernel = plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in results),
        scratch_types=shared_memory,
        grid=(of_queries + 2 * key_blocks,),
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

    The first results are those of :func:`pallas_kernels.reference_rotation.rotate_and_round` if ``prompt``, and else
    the queries of :func:`pallas_kernels.reference_rotation.rotate_and_append`.
    """
    b, t, h, d = q.shape
    kv, slots = k.shape[2], cache[0].shape[2]
    scaled, mixed = scale is not None, key_offset is not None
    warps = warps_of_prompt(d, mixed) if prompt else WARPS
    kernel = make_kernel(AppendShape(b, t, h, kv, d, slots, warps, scaled, mixed), prompt)
    tables = [jnp.zeros((1,), jnp.float32) if table is None else table for table in (scale, key_offset)]
    refs = [jax.new_ref(x) for x in cache]
    results = kernel(q, k, v, cos, sin, *tables, starts, lengths, *refs)
    k_codes, k_scales, v_codes, v_scales = (jax.freeze(ref) for ref in refs)
    return results, (k_codes, k_scales, v_codes, v_scales)

"""The INT4 x FP8 matrix product for a few tokens on Hopper, in Pallas:Mosaic GPU.

With few tokens the product takes as long as the weight needs to be read, so the kernel is made to keep reads in flight.
A unit is 16 outputs, one warp's share of the weight tiles. The warps of a block share the inputs of a unit: each reads
every 16th tile straight into registers, several tiles ahead and across units, converts the codes to float16 and
multiplies them with ``mma.sync``. No warp waits for another one but where a unit's 16 partial sums are added up.
``docs/kernels.md`` says what was tried and measured.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.matvec_steps import UNIT, WARPGROUPS, WARPS, Steps, Streaming, choose_streaming
from pallas_kernels.tiling import STREAMING_MULTIPROCESSORS


def make_kernel(m: int, n: int, k: int, group_size: int, scale_dtype: Any, has_bias: bool, cut: Streaming) -> Operation:
    """The kernel for one shape: ``(x8, x_scale, tiles, tensor_scale [1], bias [n] or [1]) -> y [m, n]`` bf16."""
    ops = Steps(m, n, k, group_size, scale_dtype, cut)
    units = -(-n // UNIT)
    blocks = min(STREAMING_MULTIPROCESSORS, units)
    parts = -(-ops.tiles // (cut.rounds * WARPS))
    sums_size = UNIT * 8 * ops.blocks_of_tokens

    def body(
        x: Any, x_scale: Any, w: Any, tensor_scale: Any, bias: Any, y: Any, held: Any, partial: Any, kept: Any = None
    ) -> None:
        block = jax.lax.axis_index("block")
        mine = jax.lax.div(units - block + blocks - 1, jnp.int32(blocks))

        def after(at: Any) -> Any:
            """The part, unit and round that come next; they are gone through in this order, rounds first."""
            part, unit, at_round = at
            at_round += 1
            unit += (at_round == cut.rounds).astype(jnp.int32)
            at_round = jnp.where(at_round == cut.rounds, 0, at_round)
            part += (unit == mine).astype(jnp.int32)
            return part, jnp.where(unit == mine, 0, unit), at_round

        def fetch(at: Any) -> Any:
            part, unit, at_round = at
            return ops.fetch()(w, block + unit * blocks, (part * cut.rounds + at_round) * WARPS)

        def step(at: Any, sums: Any, codes: Any, scales: Any) -> Any:
            part, unit, at_round = at
            if parts > 1:

                @pl.when((unit == 0) & (at_round == 0) & (part > 0) & (part < parts))
                def next_part() -> None:
                    ops.stage()(x, held, part * cut.rounds * WARPS)
                    ops.barrier()()

            sums = ops.multiply()(sums, (at_round == 0).astype(jnp.int32), codes, scales, held, at_round * WARPS)

            @pl.when((at_round == cut.rounds - 1) & (part < parts))
            def unit_done() -> None:
                odd = jax.lax.rem(part * mine + unit, jnp.int32(2))
                before = [kept, unit] if parts > 1 else []
                ops.finish(has_bias, parts)(
                    sums, partial.at[odd], factor, bias, y, block + unit * blocks, part, *before
                )

            return sums

        reads = []
        to_read = (jnp.int32(0),) * 3
        for _ in range(cut.ahead):
            reads.append(fetch(to_read))
            to_read = after(to_read)
        ops.stage()(x, held, jnp.int32(0))
        factor = ops.load_factor()(x_scale, tensor_scale)
        ops.barrier()()

        def trip(_: Any, carry: Any) -> Any:
            at, to_read, sums, reads = carry
            reads = list(reads)
            for i in range(cut.ahead):
                sums = step(at, sums, *reads[i])
                reads[i] = fetch(to_read)
                at, to_read = after(at), after(to_read)
            return at, to_read, sums, tuple(reads)

        sums = jnp.zeros((hopper.WARPGROUP * 4 * ops.blocks_of_tokens,), jnp.float32)
        sums = plgpu.layout_cast(sums, ops.layout["sums"])
        trips = jax.lax.div(parts * cut.rounds * mine + cut.ahead - 1, jnp.int32(cut.ahead))
        jax.lax.fori_loop(0, trips, trip, ((jnp.int32(0),) * 3, to_read, sums, tuple(reads)))

    scratch: list[Any] = [
        plgpu.SMEM((m * ops.pitch // 4,), jnp.int32),
        plgpu.SMEM((2, WARPS * sums_size), jnp.float32),
    ]
    if parts > 1:
        scratch.append(plgpu.SMEM((-(-units // blocks) * sums_size,), jnp.float32))
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        scratch_types=scratch,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
    )
    return cast(Operation, kernel)


def matvec(
    x8: jax.Array,
    x_scale: jax.Array,
    tiles: jax.Array,
    tensor_scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    n: int,
    group_size: int,
    scale_dtype: Any,
    cut: Streaming | None = None,
) -> jax.Array:
    """:func:`pallas_kernels.mosaic_matmul.matmul` for up to 16 tokens: same arguments, same result, float32 sums.

    Args:
      x8: ``[m, k]`` e4m3, m up to 16.
      x_scale: ``[m]`` float32.
      tiles: int32, what :func:`pallas_kernels.weight_layout.to_tiles` makes of the weight.
      tensor_scale: scalar float32.
      bias: ``[n]`` float, or None.
      n: outputs.
      group_size: 32, 64 or 128, a divisor of k.
      scale_dtype: of the group scales in ``tiles``, e4m3 or bf16.
      cut: chosen by :func:`choose_streaming` if None.

    Returns:
      ``[m, n]`` bf16.

    Raises:
      NotImplementedError: there are more tokens, or sums of that many outputs do not fit into shared memory.
    """
    m, k = x8.shape
    cut = cut or choose_streaming(m, n, k)
    if cut is None:
        raise NotImplementedError(f"{m} tokens by {n} outputs by {k} inputs do not suit the kernel for few tokens")
    kernel = make_kernel(m, n, k, group_size, jnp.dtype(scale_dtype), bias is not None, cut)
    offsets = jnp.zeros((1,), jnp.float32) if bias is None else bias.astype(jnp.float32)
    return cast(jax.Array, kernel(x8, x_scale, tiles, tensor_scale.reshape(1), offsets))

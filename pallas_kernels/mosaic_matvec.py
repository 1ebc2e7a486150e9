"""The INT4 x FP8 matrix product for a few tokens on Hopper, in Pallas:Mosaic GPU.

With few tokens the product takes as long as the weight needs to be read, so the kernel is made to keep reads in flight.
A unit is 16 outputs, one share of the weight tiles. The warps of a team share the inputs of a unit: of a team of four,
each takes every fourth tile, converts the codes to float16 and multiplies them with ``mma.sync``. It has its tiles
copied to slots of its own in shared memory, ahead and across units, from the first instructions of the kernel on. No
warp waits for another one but where a team's partial sums are added up.
``docs/kernels.md`` says what was tried and measured.
"""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.matmul_steps import Operation
from pallas_kernels.matvec_steps import Steps
from pallas_kernels.tiling import SUMS_PITCH, WARPS, Streaming, choose_streaming
from pallas_kernels.weight_layout import share_bytes


def make_kernel(m: int, n: int, k: int, group_size: int, scale_dtype: Any, has_bias: bool, cut: Streaming) -> Operation:
    """The kernel for one shape: ``(x8, x_scale, tiles, tensor_scale [1], bias [n] or [1]) -> y [m, n]`` bf16."""
    ops = Steps(m, n, k, group_size, scale_dtype, cut)
    parts, turns = cut.parts(k), cut.turns(n)
    sums_size = SUMS_PITCH * 8 * ops.blocks_of_tokens

    def body(
        x: Any, x_scale: Any, w: Any, tensor_scale: Any, bias: Any, y: Any,
        held: Any, partial: Any, slots: Any, arrivals: Any, kept: Any = None,
    ) -> None:  # fmt: skip
        block = jax.lax.axis_index("block")

        def after(at: Any) -> Any:
            """The part, turn and round that come next; they are gone through in this order, rounds first."""
            part, turn, at_round = at
            at_round += 1
            turn += (at_round == cut.rounds).astype(jnp.int32)
            at_round = jnp.where(at_round == cut.rounds, 0, at_round)
            part += (turn == turns).astype(jnp.int32)
            return part, jnp.where(turn == turns, 0, turn), at_round

        def unit(turn: Any) -> Any:
            return block + turn * (ops.teams * ops.blocks)

        def request(at: Any, slot: Any) -> None:
            part, turn, at_round = at
            tile = (part * cut.rounds + at_round) * cut.team
            ops.request()(w, slots, arrivals, slot, unit(turn), tile, (part < parts).astype(jnp.int32))

        ops.open_slots()(arrivals)
        # First, for all waits for the inputs, and what is read behind many tiles arrives behind them.
        inputs = ops.load_inputs()(x, jnp.int32(0))
        factors = ops.load_factors()(x_scale, tensor_scale)
        to_read = (jnp.int32(0),) * 3
        for slot in range(cut.slots):
            request(to_read, jnp.int32(slot))
            to_read = after(to_read)
        ops.hold_inputs()(inputs, held)
        ops.barrier()()

        def step(_: Any, carry: Any) -> Any:
            at, to_read, slot, parity, sums = carry
            part, turn, at_round = at
            if parts > 1:

                @pl.when((turn == 0) & (at_round == 0) & (part > 0))
                def next_part() -> None:
                    ops.barrier()()
                    ops.hold_inputs()(ops.load_inputs()(x, part * cut.rounds * cut.team), held)
                    ops.barrier()()

            codes, scales = ops.take()(slots, arrivals, slot, parity, (part * cut.rounds + at_round) * cut.team)
            request(to_read, slot)
            sums = ops.multiply()(sums, (at_round == 0).astype(jnp.int32), codes, scales, held, at_round * cut.team)

            @pl.when(at_round == cut.rounds - 1)
            def unit_done() -> None:
                odd = jax.lax.rem(part * turns + turn, jnp.int32(2))
                before = [kept, turn] if parts > 1 else []
                ops.finish(has_bias, parts)(sums, partial.at[odd], factors, bias, y, unit(turn), part, *before)

            slot += 1
            parity = jnp.where(slot == cut.slots, 1 - parity, parity)
            return after(at), after(to_read), jnp.where(slot == cut.slots, 0, slot), parity, sums

        sums = jnp.zeros((hopper.WARPGROUP * 4 * ops.blocks_of_tokens,), jnp.float32)
        sums = plgpu.layout_cast(sums, ops.layout["sums"])
        first = ((jnp.int32(0),) * 3, to_read, jnp.int32(0), jnp.int32(0), sums)
        jax.lax.fori_loop(0, parts * cut.rounds * turns, step, first)

    scratch: list[Any] = [
        plgpu.SMEM((m * ops.pitch // 4,), jnp.int32),
        plgpu.SMEM((2, WARPS * sums_size), jnp.float32),
        plgpu.SMEM((cut.slots * WARPS * ops.share_bytes // 4,), jnp.int32),
        plgpu.SMEM((cut.slots * WARPS * 2,), jnp.int32),
    ]
    if parts > 1:
        scratch.append(plgpu.SMEM((turns * ops.teams * sums_size,), jnp.float32))
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), jnp.bfloat16),
        scratch_types=scratch,
        grid=(ops.blocks,),
        grid_names=("block",),
        num_threads=WARPS // 4,
        thread_name="warpgroup",
        compiler_params=hopper.COMPILER_PARAMS,
    )
    return cast(Operation, kernel)


@functools.partial(jax.jit, static_argnames=("n", "group_size", "scale_dtype", "cut"))
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
    cut = cut or choose_streaming(m, n, k, share_bytes(group_size, scale_dtype))
    if cut is None:
        raise NotImplementedError(f"{m} tokens by {n} outputs by {k} inputs do not suit the kernel for few tokens")
    kernel = make_kernel(m, n, k, group_size, jnp.dtype(scale_dtype), bias is not None, cut)
    offsets = jnp.zeros((1,), jnp.float32) if bias is None else bias.astype(jnp.float32)
    return cast(jax.Array, kernel(x8, x_scale, tiles, tensor_scale.reshape(1), offsets))

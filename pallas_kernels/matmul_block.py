"""What a block of threads of the INT4 x FP8 matmul does: one warpgroup copies, the others compute."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.first_pair import FirstPair
from pallas_kernels.matmul_plan import Plan
from pallas_kernels.matmul_tile import TileAtWork
from pallas_kernels.weight_layout import TILE_K


class Block:
    """A block at work.

    Args:
      plan: of the product.
      x: the activations.
      x_scale: their scales.
      refs: what else the kernel is given, makes and has in shared memory, see :func:`mosaic_matmul.make_kernel`.
    """

    def __init__(self, plan: Plan, x: Any, x_scale: Any, refs: Sequence[Any]) -> None:
        t, self.plan, self.ops = plan.tiling, plan, plan.ops
        self.x, self.x_scale = x, x_scale
        weights, streams = len(plan.sizes), plan.stream is not None
        counts = (plan.has_residual, weights, weights, weights * plan.has_bias, streams, weights, streams)
        ends = list(itertools.accumulate(counts, initial=0))
        self.residual, self.w, self.tensor_scales, self.biases, self.flags, self.y, self.sums = (
            refs[start:end] for start, end in itertools.pairwise(ends)
        )
        self.x_smem, self.w_smem, self.y_smem, self.full, self.empty, *rest = refs[ends[-1] :]
        self.residual_here: Any = rest.pop() if plan.has_residual else None
        self.landing: Any = rest.pop() if plan.lands else None
        self.room: Any = rest.pop() if plan.in_cluster.apart else self.x_smem.at[0]  # for sums of a part
        if plan.first_pair is not None:  # when the first step's tokens are there, and either step's weights
            self.first_tokens: Any = rest.pop()
            self.first_weights: Any = rest.pop()
        self.received: Any = rest.pop() if rest else None
        self.block, warpgroup = jax.lax.axis_index("block"), jax.lax.axis_index("warpgroup")
        self.peer = jax.lax.axis_index("peer") if plan.cluster > 1 else jnp.int32(0)
        self.side = jax.lax.rem(warpgroup, jnp.int32(t.sides))
        self.team = jax.lax.div(warpgroup, jnp.int32(t.sides))
        # Of those who write a tile: which part of its tokens, and which of the block's warpgroups.
        self.part, self.writer = self.peer, self.side
        if t.divides_sums:
            self.part, self.writer = self.peer * t.teams + self.team, warpgroup

    def run(self) -> None:
        """All tiles of the block."""
        t, plan = self.plan.tiling, self.plan
        self.first_step = self.peer * (plan.steps * t.teams) if t.split > 1 else 0
        if plan.stream is not None:
            self.mine = plan.stream.pieces(self.block)
        elif plan.rounds.divided:
            self.mine = plan.rounds.whole + (self.block < plan.rounds.divided).astype(jnp.int32)
        else:
            self.mine = jax.lax.div(plan.tiles - self.block + plan.blocks - 1, jnp.int32(plan.blocks))
        if plan.first_pair is not None:
            plan.first_pair.open()(self.first_weights)
        if self.landing is not None:
            self.plan.in_cluster.open_landing()(self.landing)
        if plan.cluster > 1:
            hopper.cluster_arrive()
        pl.when(self.team == t.teams)(self._produce)
        pl.when(self.team < t.teams)(self._compute)

    def is_whole(self, i: Any) -> Any:
        """Whether the block's tile i is not divided."""
        return i < self.plan.rounds.whole

    def slot_of(self, step: Any) -> Any:
        """Where a block's step is, counted through all tiles; a team's slots are always the same ones."""
        return jax.lax.rem(step, self.plan.tiling.stages)

    def barrier_of(self, slot: Any) -> Any:
        """The number of a slot's barriers."""
        return slot if self.plan.tiling.at_once == 1 else jax.lax.div(slot, jnp.int32(self.plan.tiling.at_once))

    def release(self, barrier: Any) -> None:
        """Tells the one who copies that a warpgroup is done with a slot."""
        if self.plan.tiling.share > 1:  # one thread arrives for all of them, in both blocks
            hopper.warpgroup_barrier()
        plgpu.barrier_arrive(self.empty.at[barrier])

    def _produce(self) -> None:
        t = self.plan.tiling
        if self.plan.registers is not None:
            plgpu.set_max_registers(self.plan.registers[0], action="decrease")
        if t.share > 1:  # the other block's barriers must exist
            hopper.cluster_wait()
        jax.lax.fori_loop(0, self.mine, self._produce_tile, None)
        if t.split > 1:
            hopper.cluster_wait()

    def _produce_tile(self, i: Any, _: None) -> None:
        t, plan = self.plan.tiling, self.plan
        tile = plan.tile(i, self.block, self.peer)
        sides = range(0, t.sides, plan.sides_together)
        places = [plan.of_weight(tile.row * t.sides + side) for side in sides]

        def copy_tokens(slot: Any, at: Any, steps: int, barrier: Any) -> None:
            """Inputs of steps from the tile's step ``at`` on."""

            def copy_rows(rows: int, together: str | None) -> None:
                for u in range(steps):
                    inputs = self.x.at[pl.ds(tile.token * t.tokens, rows), pl.ds((at + u) * TILE_K, TILE_K)]
                    target = self.x_smem.at[slot + u, pl.ds(0, rows)] if rows < t.tokens else self.x_smem.at[slot + u]
                    plgpu.copy_gmem_to_smem(inputs, target, barrier, collective_axes=together)

            def copy(together: str | None) -> None:
                if plan.last_rows == t.tokens or plan.token_tiles == 1:
                    copy_rows(plan.last_rows, together)
                    return
                is_last = tile.token == plan.token_tiles - 1
                pl.when(is_last)(functools.partial(copy_rows, plan.last_rows, together))
                pl.when(~is_last)(functools.partial(copy_rows, t.tokens, together))

            together = "peer" if t.share > 1 else None
            if plan.rounds.divided:
                pl.when(self.is_whole(i))(functools.partial(copy, together))
                pl.when(~self.is_whole(i))(functools.partial(copy, None))
            else:
                copy(together)

        first = self.first_step + tile.first

        def produce_first_pair(pair: FirstPair) -> None:
            for u, barrier in enumerate((self.first_tokens, self.full.at[0])):

                def ask(side: int, row: Any, number: int, u: int = u) -> None:
                    where = self.w[number], self.w_smem.at[0, side], self.first_weights
                    pair.copy(number, u)(*where, row, jnp.int32(first + u))

                for side, (weight, row) in zip(sides, places, strict=True):
                    plan.for_weight(weight, functools.partial(ask, side, row))
                copy_tokens(u, first + u, 1, barrier)
            for _ in range(plan.copies - 1):  # those that come at barriers of their own
                plgpu.barrier_arrive(self.full.at[0])

        def produce_step(j: Any, _: None) -> None:
            s = j * t.at_once
            slot, at = self.slot_of(tile.before + s), first + s
            barrier = self.full.at[self.barrier_of(slot)]

            @pl.when(tile.before + s >= t.stages)
            def reuse() -> None:
                plgpu.barrier_wait(self.empty.at[self.barrier_of(slot)])

            def copy_weight(side: int, row: Any, number: int) -> None:
                where = pl.ds(row, plan.sides_together), pl.ds(at, t.at_once)
                target = self.w_smem.at[self.barrier_of(slot), pl.ds(side, plan.sides_together)]
                plgpu.copy_gmem_to_smem(self.w[number].at[where], target, barrier)

            copy_tokens(slot, at, t.at_once, barrier)
            for side, (weight, row) in zip(sides, places, strict=True):
                plan.for_weight(weight, functools.partial(copy_weight, side, row))

        begin: Any = 0
        if plan.first_pair is not None:
            pl.when(i == 0)(functools.partial(produce_first_pair, plan.first_pair))
            begin = (i == 0).astype(jnp.int32)
        jax.lax.fori_loop(begin, tile.count * t.teams // t.at_once, produce_step, None)

    def _compute(self) -> None:
        t = self.plan.tiling
        if self.plan.registers is not None:
            plgpu.set_max_registers(self.plan.registers[1], action="increase")
        if t.share > 1:
            hopper.cluster_wait()
        jax.lax.fori_loop(0, self.mine, lambda i, _: TileAtWork(self, i).compute(), None)
        plgpu.wait_smem_to_gmem(0)
        if t.share > 1:  # the other block still arrives on this one's barriers
            hopper.cluster_arrive_done()
            hopper.cluster_wait()

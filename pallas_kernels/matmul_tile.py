"""A tile of the INT4 x FP8 matmul in the hands of a computing warpgroup: steps, whom it adds up with, results."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.matmul_steps import Steps
from pallas_kernels.tiling import StreamK
from pallas_kernels.weight_layout import TILE_N

if TYPE_CHECKING:
    from pallas_kernels.first_pair import FirstPair
    from pallas_kernels.matmul_block import Block

LOADED_AT_ONCE = 64  # registers of a thread, of other blocks' sums of a half


class Sums(NamedTuple):
    """What a warpgroup has of a tile: a container for each part of the tokens, of the kind that :class:`Steps` says.

    Accumulators have scales as units; for short sums these are of no meaning.
    """

    parts: Sequence[Any]
    unit: Any


class Part(NamedTuple):
    """What a warpgroup has of some of a tile's tokens while it takes steps.

    Attributes:
      sums: in a container, of the kind that :class:`Steps` says.
      products: of short sums, those of the last group; else None.
    """

    sums: Any
    products: Any


class TileAtWork:
    """A tile, or the part of it that a block takes, as a computing warpgroup goes through it."""

    def __init__(self, block: "Block", i: Any) -> None:
        self.block, self.plan, self.ops = block, block.plan, block.ops
        t, plan = self.plan.tiling, self.plan
        self.tile = plan.tile(i, block.block, block.peer)
        self.weight, row = plan.of_weight(self.tile.row * t.sides + block.side)
        self.output = row * TILE_N
        self.first_result = self.tile.token * t.tokens  # the first token of the results that this block writes
        if t.divides_sums:
            self.first_result += block.part * t.part
        elif plan.rounds.divided:
            self.first_result += jnp.where(block.is_whole(i), 0, block.part * t.part)
        self.ends_tile = self.tile.first + self.tile.count == plan.steps

    def compute(self) -> None:
        """Takes all steps, adds up with others if there are, and writes what this block is to write."""
        t, plan, block = self.plan.tiling, self.plan, self.block
        load = self.ops.load_factors()
        self.factors = load(self.weight, self.first_result, block.x_scale, *block.tensor_scales)
        if plan.has_residual and plan.asking < 0:
            if plan.stream is not None:
                pl.when(self.ends_tile)(self._ask_for_residual)
            elif t.parts > 1 and not t.divides_sums:
                pl.when((block.team == 0) & (block.peer == 0))(self._ask_for_residual)
            else:
                self._ask_for_residual()
        self.ones = plgpu.layout_cast(jnp.ones((256,), jnp.float32), self.ops.layout["pair"])
        sums = self._multiply()
        if plan.stream is not None:
            self._exchange(plan.stream, sums)
        elif t.divides_sums:
            self._write_part(sums)
        elif t.parts == 1:
            if plan.rounds.whole:
                write = functools.partial(self._write, self.ops, sums)
                pl.when(block.is_whole(self.tile.number))(write) if plan.rounds.divided else write()
            if plan.rounds.divided:
                pl.when(~block.is_whole(self.tile.number))(lambda: self._write_part(sums))
        else:
            self._add_up(sums)

    def _ask_for_residual(self) -> None:
        block = self.block
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.copy_gmem_to_smem(
            block.residual[0].at[pl.ds(self.first_result, self.plan.tiling.written), pl.ds(self.output, TILE_N)],
            block.y_smem.at[block.writer], block.residual_here.at[block.writer],
        )  # fmt: skip

    def _slot(self, s: Any, r: int | None) -> Any:
        """Where the team's step s is, if known that of the tile's step r."""
        teams, team = self.plan.tiling.teams, self.block.team
        if r is None:
            return self.block.slot_of(self.tile.before + (s * teams + team if teams > 1 else s))
        known = r % self.plan.slots_of_team * teams
        return known + team if teams > 1 else known

    def _barrier(self, s: Any, r: int | None) -> Any:
        at_once, teams = self.plan.tiling.at_once, self.plan.tiling.teams
        if r is None or at_once == 1:
            return self.block.barrier_of(self._slot(s, r))
        known = r % self.plan.slots_of_team * teams // at_once
        return known + jax.lax.div(self.block.team, jnp.int32(at_once)) if teams > 1 else known

    def _await_first_pair(self, pair: "FirstPair", s: Any, number: int, full: Any) -> None:
        """Waits for the tile's step s, which is its first one or may be its second one, in this order of ``number``.

        Of a block's first tile each comes by copies of its own, of others both come together, to the barrier ``full``.
        """
        block, first_tile = self.block, self.tile.number == 0

        @pl.when(first_tile & (s == number))
        def alone() -> None:
            plgpu.barrier_wait(full if number else block.first_tokens)
            pair.wait(number)(block.first_weights)

        if number == 0:
            pl.when(~first_tile)(lambda: plgpu.barrier_wait(full))

    def _fetch(
        self, s: Any, r: int | None, last: Any, ends: bool, begins: bool = True, number: int | None = None
    ) -> Any:  # fmt: skip
        """Operand and scales of the team's step s; behind the last one, where chains end, those of the last.

        Only the step that ``begins`` those that are copied together waits, if one team takes all of them; and those of
        a block's first pair, which ``number`` says that it may be.
        """
        block, at_once = self.block, self.plan.tiling.at_once
        at, barrier = self._slot(s, r), self._barrier(s, r)
        if ends:
            exists = s < self.tile.count
            pl.when(exists)(lambda: plgpu.barrier_wait(block.full.at[barrier]))
            before = None if r is None else r - 1
            at = jnp.where(exists, at, self._slot(s - 1, before))
            barrier = jnp.where(exists, barrier, self._barrier(s - 1, before))
        elif number is not None and self.plan.first_pair is not None:
            self._await_first_pair(self.plan.first_pair, s, number, block.full.at[barrier])
        elif begins:
            plgpu.barrier_wait(block.full.at[barrier])
        tile = block.side * at_once
        if at_once > 1:
            of_pair = at if r is None else block.team if self.plan.tiling.teams > 1 else jnp.int32(r)
            tile += jax.lax.rem(of_pair, jnp.int32(at_once))
        return self.ops.load_weights()(block.w_smem.at[barrier], tile, last)

    def _chain(self, s: Any, r: int | None, length: int, carry: Any, ends: bool) -> Any:
        """``length`` steps whose wgmmas overlap; none runs at the end.

        The compiler serialises wgmmas that still run where a loop begins anew, hence chains of several steps.
        """
        ops, block, halves = self.ops, self.block, self.plan.tiling.halves

        def of_tile(u: int) -> int | None:
            return None if r is None else r + u

        operand, ratios, unit, last, parts = carry
        parts = list(parts)
        before, here = operand, (ratios, 0)
        taken = self.plan.tiling.at_once if self.plan.tiling.teams == 1 else 1  # of the steps that are copied together
        for u in range(length):
            tokens = block.x_smem.at[self._slot(s + u, of_tile(u))]
            first = jnp.int32(s + u == 0) if not of_tile(u) else jnp.int32(0)
            for group in range(ops.groups):
                issued = group, operand, tokens, first
                parts[0] = self._issue(0, parts[0], *issued)
                if halves == 2:
                    if u or group:
                        parts[1] = self._settled(1, parts[1], here, (ratios, group), before)
                        if group == 0:
                            block.release(self._barrier(s + u - 1, of_tile(u - 1)))
                    parts[1] = self._issue(1, parts[1], *issued)
                before, here, next_group = operand, (ratios, group), group + 1
                if group == ops.groups - 1:
                    operand, ratios, unit, last = self._fetch(
                        s + u + 1, of_tile(u + 1), last, ends=ends and u == length - 1, begins=(u + 1) % taken == 0,
                        number=None if u or r else 1,
                    )  # fmt: skip
                    next_group = 0
                parts[0] = self._settled(halves - 1, parts[0], here, (ratios, next_group), before, operand)
                if halves == 1 and group == ops.groups - 1 and (u + 1) % taken == 0:
                    block.release(self._barrier(s + u, of_tile(u)))
        if halves == 2:
            parts[1] = self._settled(0, parts[1], here, (ratios, 0), before)
            block.release(self._barrier(s + length - 1, of_tile(length - 1)))
        return operand, ratios, unit, last, tuple(parts)

    def _issue(self, half: int, part: Part, group: int, operand: Any, tokens: Any, first: Any) -> Part:
        """A group's products begin to run."""
        if self.ops.short:
            return Part(part.sums, self.ops.multiply_alone(half, group)(part.products, operand, tokens))
        return Part(self.ops.multiply(half, group)(part.sums, operand, tokens, first), None)

    def _settled(
        self, in_flight: int, part: Part, here: tuple[Any, int], following: tuple[Any, int], *operands: Any
    ) -> Part:
        """A part with the products that ran.

        Args:
          in_flight: groups of products that may run on.
          part: of :meth:`_issue`.
          here: the ratios among which the group's are, and its number there.
          following: those of the group behind it.
          operands: of running products.
        """
        kept = len(operands)
        if self.ops.short:
            ratios, group = here
            return Part(*self.ops.add(in_flight, group, kept)(part.sums, part.products, ratios, *operands))
        ratios, group = following
        return Part(self.ops.settle(in_flight, group, kept)(part.sums, ratios, *operands), None)

    def _chains(self, start: Any, number: int, begin: int, carry: Any, ends: bool) -> Any:
        """So many steps from ``start`` on, whose slots begin with the one of the tile's step ``begin``."""
        unroll = self.plan.tiling.unroll
        for at in range(0, number, unroll):
            length = min(unroll, number - at)
            known = begin + at if self.plan.slots_known else None
            carry = self._chain(start + at, known, length, carry, ends=ends and at + length == number)
        return carry

    def _multiply(self) -> Sums:
        """All steps of the block."""
        plan, together = self.plan, self.plan.together
        shape = self.ops.type[self.ops.kind]
        empty = plgpu.layout_cast(jnp.zeros(shape.shape, shape.dtype), self.ops.layout[self.ops.kind])
        rest = 0 if plan.stream is not None else plan.steps % together
        turns: Any = jax.lax.div(self.tile.count, together) if plan.counts_vary else plan.steps // together
        fetched = self._fetch(jnp.int32(0), 0 if plan.slots_known else None, self.ones, ends=False, number=0)
        parts = (Part(empty, empty if self.ops.short else None),) * plan.tiling.halves
        carry = self._chains(jnp.int32(0), rest, 0, (*fetched, parts), ends=turns == 0)

        def turn(j: Any, carry: Any) -> Any:
            carry = self._chains(rest + j * together, together, rest, carry, ends=True)
            if plan.has_residual and plan.asking >= 0:
                pl.when(j == plan.asking)(self._ask_for_residual)
            return carry

        _, _, unit, _, parts = jax.lax.fori_loop(0, turns, turn, carry)
        return Sums([part.sums for part in parts], unit)

    def _write(self, its: Steps, sums: Sums) -> None:
        """Results of the parts of the tokens whose sums ``its`` tile has, from ``first_result`` on."""
        plan, block = self.plan, self.block
        in_bfloat16 = plan.out_dtype == jnp.bfloat16
        if in_bfloat16 and not plan.has_residual:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        elif in_bfloat16:
            plgpu.barrier_wait(block.residual_here.at[block.writer])
        added = []
        if plan.has_bias:
            added.append(self.ops.load_bias()(self.weight, self.output, *block.biases))
        for h, part in enumerate(sums.parts):
            tokens, results = self.first_result + h * its.half, (part, sums.unit, self.factors)
            done = block.y_smem.at[block.writer, pl.ds(h * its.half, its.half)]
            if in_bfloat16:
                its.store(h, plan.has_bias, plan.has_residual)(*results, block.y_smem.at[block.writer], *added)
                plgpu.commit_smem()

            def write_results(
                number: int, h: int = h, results: Any = results, tokens: Any = tokens, done: Any = done
            ) -> None:
                y = block.y[number]
                if in_bfloat16:
                    plgpu.copy_smem_to_gmem(done, y.at[pl.ds(tokens, its.half), pl.ds(self.output, TILE_N)])
                else:
                    store = its.store_float32(h, plan.has_bias, plan.sizes[number])
                    store(*results, tokens, self.output, y, *added)

            plan.for_weight(self.weight, write_results)

    def _exchange(self, stream: StreamK, sums: Sums) -> None:
        """Leaves sums of a part for the block that has the tile's end; that one adds them to its own, and writes."""
        block, exchange, sides = self.block, self.plan.exchange, self.plan.tiling.sides
        place = block.block * sides + block.side

        @pl.when(~self.ends_tile)
        def send() -> None:
            exchange.send()(place, sums.unit, block.sums[0], *sums.parts)
            hopper.warpgroup_barrier()
            exchange.announce()(place, block.flags[0])

        @pl.when(self.ends_tile)
        def add() -> None:
            start = stream.first_block(self.tile.group) * sides + block.side
            at_once = max(1, min(stream.senders, LOADED_AT_ONCE // self.ops.registers))

            def add_some(j: Any, totals: Any) -> Any:
                return exchange.add(at_once)(start + j * (at_once * sides), place, block.sums[0], *totals)

            exchange.wait()(start, place, block.flags[0])
            rounds = jax.lax.div(place - start + (at_once * sides - 1), jnp.int32(at_once * sides))
            totals = exchange.to_units()(sums.unit, *sums.parts)
            self._write(self.ops, Sums(jax.lax.fori_loop(0, rounds, add_some, totals), self.ones))

    def _write_part(self, sums: Sums) -> None:
        """Of a tile that several take together: adds up all their sums of some of the tokens, and writes these."""
        cluster, block = self.plan.in_cluster, self.block
        if self.plan.tiling.split > 1:
            hopper.cluster_wait()  # as when the kernel began
        if not cluster.apart:  # the others are done with what they read, where sums will land
            if self.plan.lands:
                hopper.cluster_arrive()
                hopper.cluster_wait()
            else:
                cluster.meet_all()()
        here = block.side, block.part, sums.unit, block.room
        cluster.send_parts()(*here, *sums.parts, *[block.landing] * self.plan.lands)
        if self.plan.lands:
            cluster.await_landing()(block.landing)
        else:
            cluster.meet_all()()
        self._write(self.plan.part_ops, Sums([cluster.gather_parts()(*here, *sums.parts)], self.ones))

    def _gathered(self, sums: Sums, first: int, senders: int) -> Sums:
        """With those that others sent to this block's shared memory."""
        received = self.block.received.at[first, self.block.side]
        gathered = [
            self.plan.in_cluster.gather(h, senders)(part, sums.unit, received) for h, part in enumerate(sums.parts)
        ]
        return Sums(gathered, self.ones)

    def _add_up(self, sums: Sums) -> None:
        """Adds up with the block's other teams, then with the cluster's other blocks; the first of these writes."""
        t, cluster, block = self.plan.tiling, self.plan.in_cluster, self.block
        if t.split > 1:
            hopper.cluster_wait()
        if t.teams > 1:

            @pl.when(block.team > 0)
            def other_team() -> None:
                for h in range(t.halves):
                    received = block.received.at[t.split - 2 + block.team, block.side]
                    cluster.send(h, within_block=True)(sums.parts[h], sums.unit, received)

            cluster.meet()(block.side)

        def first_team() -> None:
            ours = self._gathered(sums, t.split - 1, t.teams - 1) if t.teams > 1 else sums
            if t.split == 1:
                self._write(self.ops, ours)
                return

            @pl.when(block.peer > 0)
            def other_block() -> None:
                for h in range(t.halves):
                    received = block.received.at[block.peer - 1, block.side]
                    cluster.send(h)(ours.parts[h], ours.unit, received, block.landing)

            @pl.when(block.peer == 0)
            def leader() -> None:
                cluster.await_landing()(block.landing)
                self._write(self.ops, self._gathered(ours, 0, t.split - 1))

        pl.when(block.team == 0)(first_team) if t.teams > 1 else first_team()

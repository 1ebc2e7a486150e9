"""How the INT4 x FP8 matmul is divided among blocks and steps: all that the compiler knows."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.cluster_steps import ClusterSums
from pallas_kernels.first_pair import BARRIERS, FirstPair
from pallas_kernels.matmul_steps import Steps
from pallas_kernels.stream_steps import Exchange
from pallas_kernels.tiling import FEW_TOKENS_OF_TILES, Tiling, plan_rounds, plan_stream
from pallas_kernels.weight_layout import TILE_K, TILE_N, tile_shape


class Tile(NamedTuple):
    """A tile of a block.

    Attributes:
      number: of the block's tiles.
      group: of :class:`pallas_kernels.tiling.Rounds`; with ``stream_k`` the tile's number among all.
      row: of blocks of outputs, counted through all weights.
      token: of tiles of tokens.
      first: of its steps that the block takes.
      count: how many each team takes.
      before: steps of the block's earlier tiles.
    """

    number: Any
    group: Any
    row: Any
    token: Any
    first: Any
    count: Any
    before: Any


class Plan:
    """How a product of one shape is divided; what the compiler knows.

    Args:
      m: tokens.
      sizes: outputs of each weight.
      k: inputs.
      group_size: inputs that share a scale.
      scale_dtype: of these scales.
      tiling: how it is cut.
      has_bias: whether there are biases.
      has_residual: whether there is a residual.
      out_dtype: of the results.
      folded: whether weights are rounded with their scales.
    """

    def __init__(
        self, m: int, sizes: tuple[int, ...], k: int, group_size: int, scale_dtype: Any, tiling: Tiling,
        *, has_bias: bool, has_residual: bool, out_dtype: Any, folded: bool,
    ) -> None:  # fmt: skip
        t = tiling
        self.m, self.sizes, self.tiling, self.out_dtype = m, sizes, t, out_dtype
        self.has_bias, self.has_residual = has_bias, has_residual
        self.tile_shape = tile_shape(group_size, scale_dtype)
        self.ops = Steps(m, sizes, k, group_size, scale_dtype, t, folded=folded)
        self.in_cluster, self.exchange = ClusterSums(self.ops), Exchange(self.ops)
        steps = -(-k // TILE_K)
        if t.parts > 1 or t.at_once > 1:  # every part takes as many steps; those behind the last one read zeros
            steps = math.ceil(steps / (t.parts * t.unroll)) * t.unroll
        # Sides of a block whose 64 outputs each are of one weight, and copied together.
        self.sides_together = 1 if t.sides == 3 else t.sides
        blocks = [-(-n // (TILE_N * self.sides_together)) for n in sizes]
        self.ends_of_weights = [self.sides_together * end for end in itertools.accumulate(blocks)]  # in 64 outputs
        rows, self.token_tiles = -(-self.ends_of_weights[-1] // t.sides), -(-m // t.tokens)
        self.row_groups = -(-rows // t.share)
        self.tiles = self.row_groups * self.token_tiles
        self.persistent = t.persistent and t.parts == 1
        self.rounds = plan_rounds(
            dataclasses.replace(t, persistent=self.persistent), rows, self.token_tiles, steps
        )  # fmt: skip
        self.blocks, self.steps = self.rounds.clusters, self.rounds.steps
        self.stream = plan_stream(t, self.tiles, steps) if t.stream_k else None
        if self.stream is not None:
            self.blocks, self.steps = self.stream.blocks, self.stream.chains * t.unroll
        # Of one step there is no pair.
        self.first_pair = FirstPair(self.ops, k) if t.begins_alone and k > TILE_K else None
        self.copies = t.at_once + t.sides // self.sides_together  # that bring the steps that are copied together
        self.counts_vary = self.stream is not None or self.rounds.divided > 0  # of a block's steps of a tile
        self.slots_of_team = t.stages // t.teams
        # Steps of a turn of the loop: where a tile begins with the first slot, as many as bring it back there, so that
        # the compiler knows all addresses (without that a sixth of a step's instructions find them). Else a chain's.
        self.slots_known = not self.persistent
        self.together = math.lcm(self.slots_of_team, t.unroll) if self.slots_known else t.unroll
        part_tiling = dataclasses.replace(t, tokens=t.part, halves=1, split=1, teams=1, share=1)
        self.part_ops = Steps(
            m, sizes, k, group_size, scale_dtype, part_tiling, scaled_tokens=t.tokens, folded=folded
        )  # fmt: skip
        self.lands = t.split > 1 or self.rounds.divided > 0  # whether sums come from other blocks of a cluster
        # Of the last tile of tokens those that are copied. The rest of a tile would be filled with zeros, but that
        # takes longer than copying as much, which shows where copies are most of a block's work. (Blocks that share
        # tokens copy half each.) What is found there instead makes only results that are not written.
        self.last_rows = t.tokens
        if not self.persistent or self.token_tiles == 1:
            left = m - (self.token_tiles - 1) * t.tokens
            self.last_rows = min(t.tokens, -(-left // (8 * t.share)) * 8 * t.share)
        self.cluster = t.share * t.split
        self.registers = self._registers()
        # The chain behind which a tile's residual is asked for: not at once, as the last tile's results may still be
        # read; or -1 for at once.
        shortest = min(self.steps, self.rounds.part_steps or self.steps)
        asks_late = self.persistent and self.stream is None
        self.asking = min(1, shortest // t.unroll - 1) if asks_late else -1

    def _registers(self) -> tuple[int, int] | None:
        """Of a thread that copies and of one that computes, where all having as many would leave the latter too few."""
        t = self.tiling
        if t.sides * t.teams == 4 and (self.persistent or t.tokens > FEW_TOKENS_OF_TILES):
            return 24, 112  # with more than there are the kernel would wait for ever
        if t.sides == 3:
            return 24, 160
        return (40, 232) if self.persistent or t.tokens > 128 else None

    def scratch(self) -> list[Any]:
        """Shared memory and barriers, in the order in which :class:`Block` takes them."""
        t = self.tiling
        pairs = t.stages // t.at_once
        full = plgpu.Barrier(num_arrivals=self.copies, num_barriers=pairs)
        readers = t.sides if t.sides > 1 else t.at_once  # of what is copied together
        empty = plgpu.Barrier(num_arrivals=readers, num_barriers=pairs)
        shared = plgpu.ClusterBarrier(collective_axes=("peer",), num_arrivals=readers, num_barriers=pairs)
        scratch: list[Any] = [
            plgpu.SMEM((t.stages, t.tokens, TILE_K), jnp.float8_e4m3fn, transforms=self.ops.swizzle),
            plgpu.SMEM((pairs, t.sides, t.at_once, *self.tile_shape), jnp.int32),
            plgpu.SMEM((t.writers, t.written, TILE_N), jnp.bfloat16, transforms=self.ops.swizzle),
            full,
            shared if t.share > 1 else empty,
        ]
        if t.parts > 1 and not t.divides_sums:
            words = self.exchange.bytes_of_warpgroup // 4
            scratch.append(plgpu.SMEM((t.split + t.teams - 2, t.sides, words), jnp.int32))
        if self.first_pair is not None:
            scratch += [plgpu.SMEM((2 * BARRIERS,), jnp.int32), plgpu.Barrier(num_arrivals=1)]
        if self.in_cluster.apart:
            scratch.append(plgpu.SMEM((self.in_cluster.landing_bytes // 4,), jnp.int32))
        if self.lands:
            scratch.append(plgpu.SMEM((2,), jnp.int32))
        if self.has_residual:
            scratch.append(plgpu.Barrier(num_arrivals=1, num_barriers=t.writers))
        return scratch

    def results(self) -> list[jax.ShapeDtypeStruct]:
        """Of the kernel: products and, with ``stream_k``, sums that blocks leave for others."""
        results = [jax.ShapeDtypeStruct((self.m, n), self.out_dtype) for n in self.sizes]
        if self.stream is not None:
            results.append(self.exchange.results(self.blocks))
        return results

    def tile(self, i: Any, block: Any, peer: Any) -> Tile:
        """A block's tile i."""
        t = self.tiling
        if self.stream is not None:
            (group, first, count, before), beside = self.stream.piece(i, block), 0
        else:
            (group, beside, first, count), before = self.rounds.piece(i, block, peer), i * (self.steps * t.teams)
        row, token = group, jnp.int32(0)
        if self.token_tiles > 1:
            across = min(t.snake, self.token_tiles)
            row, token = plgpu.planar_snake(group, (self.row_groups, self.token_tiles), 1, across)
        row = row * t.share + (beside if t.share > 1 else 0)
        return Tile(i, group, row, token, first, count, before)

    def of_weight(self, row: Any) -> tuple[Any, Any]:
        """The weight that 64 outputs belong to, and their number there, of the number of a side counted through all."""
        weight, first = jnp.int32(0), jnp.int32(0)
        for end in self.ends_of_weights[:-1]:
            weight += (row >= end).astype(jnp.int32)
            first = jnp.where(row >= end, end, first)
        return weight, row - first

    def for_weight(self, weight: Any, do: Callable[[int], None]) -> None:
        """Calls ``do`` with the number of a weight that only the device knows."""
        for i in range(len(self.sizes)):
            if len(self.sizes) == 1:
                do(i)
            else:
                pl.when(weight == i)(functools.partial(do, i))

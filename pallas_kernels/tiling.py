"""How the Hopper kernels are cut into pieces."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.weight_layout import SHARE_N, TILE_K, TILE_N

BLOCK_N = 2 * TILE_N
SHARED_MEMORY = 232448
STREAMING_MULTIPROCESSORS = 132
FLAGS = 2 * STREAMING_MULTIPROCESSORS  # of the two warpgroups of every block
FEW_TOKENS = 16  # that the matvec kernel can take; the rules give it half as many
UNIT = SHARE_N  # outputs that the matvec kernel's warps make together
WARPS = 16  # of a block of the matvec kernel
MAX_INPUTS_OF_ONE = 16384  # of a token that the matvec kernel rounds itself: 32 of each thread
MAX_INPUTS_OF_SEVERAL = 20480  # of two or four rows of tokens together: 40 of each thread
# Of partial sums, from a token's 16 outputs to the next one's: so that neither who writes nor who adds them up finds
# many in one bank.
SUMS_PITCH = 20
MAX_ROW = 32768  # elements of a row that a block of the row kernels holds in registers
DECODE_ROWS = 16  # query rows per kv head that the decode kernel takes at most
DECODE_TILE = 32  # slots of the cache that a warp of the decode kernel takes at a time
DECODE_SLOTS = 8  # of which a cache must have a multiple: copies of 16-bit scales start and end there


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How the product is cut into pieces.

    Attributes:
      tokens: tokens of a block's tile, beside its outputs; 8 to 256.
      stages: steps of 128 inputs that shared memory holds.
      halves: 1 or 2 parts of the tokens with accumulators of their own: with two, the tensor core works on one while
        the other's accumulator is brought to the next group's scale.
      unroll: steps whose tensor core instructions overlap; at least 2.
      snake: token tiles that neighbouring blocks work on, for the L2 cache.
      split: blocks that share the inputs of a tile and add up in the first one's shared memory.
      teams: warpgroups, or pairs of them, in a block that take turns at its steps and add up in shared memory.
      share: blocks, 1 or 2, that take the same tokens and copy them once; and the last tiles together, if there are too
        few for all blocks (:func:`plan_rounds`).
      persistent: a block per multiprocessor that works through many tiles, instead of a block per tile.
      stream_k: whether the persistent blocks take equally many steps each, whatever tiles these are of, and those that
        have parts of a tile add up through global memory (stream-K, arXiv 2301.03598); for blocks of one team with two
        sides that share and split nothing.
      sides: warpgroups of a team, 1 or 2, with 64 outputs each. With one, steps are copied in pairs, for two teams or
        another even number, and blocks do not share tokens.
    """

    tokens: int
    stages: int
    halves: int = 2
    unroll: int = 4
    snake: int = 8
    split: int = 1
    share: int = 1
    persistent: bool = True
    teams: int = 1
    sides: int = 2
    stream_k: bool = False

    @property
    def outputs(self) -> int:
        """Of a block's tile."""
        return self.sides * TILE_N

    def shared_memory(self, tile_bytes: int) -> int:
        """Bytes of shared memory for a weight of such tiles, rounded up array by array as the compiler does."""
        arrays = [
            self.stages * self.tokens * TILE_K,
            self.stages * self.sides * tile_bytes,
            self.tokens * self.outputs * 2,
            (self.split + self.teams - 2) * self.tokens * self.outputs * 4,
            2 * (self.stages + 1) * 8,
            8 if self.split > 1 or self.share > 1 else 0,
        ]
        return sum(-(-size // 1024) * 1024 for size in arrays)


@dataclasses.dataclass(frozen=True)
class Rounds:
    """What the blocks of a product do one after another.

    A group is as many tiles, of neighbouring outputs and the same tokens, as a cluster has blocks.

    Attributes:
      share: blocks of a cluster.
      clusters: of blocks; or blocks, where nothing is shared.
      whole: rounds in which each block has a tile of its own; of the last one some may be left without if nothing is
        divided.
      divided: tiles behind these, one for each of that many clusters, whose blocks take a part of the inputs each.
      steps: of 128 inputs, of a whole tile.
      part_steps: of each block, of a divided tile.
    """

    share: int
    clusters: int
    whole: int
    divided: int
    steps: int
    part_steps: int

    def piece(self, i: Any, cluster: Any, peer: Any) -> tuple[Any, Any, Any, Any]:
        """What a block does in a round.

        Args:
          i: the round's number.
          cluster: the cluster's number.
          peer: the block's number in it.

        Returns:
          The group of the block's tile, the tile's number there, the first of the tile's steps that the block takes,
          and how many these are.
        """
        group = cluster + i * self.clusters
        if not self.divided:
            return group, peer, 0, self.steps
        whole = i < self.whole
        return (
            jnp.where(whole, group, self.whole * self.clusters + jax.lax.div(cluster, jnp.int32(self.share))),
            jnp.where(whole, peer, jax.lax.rem(cluster, jnp.int32(self.share))),
            jnp.where(whole, 0, peer * self.part_steps),
            jnp.where(whole, self.steps, self.part_steps),
        )


MAX_SENDERS = 16  # blocks that share a tile; a warp can wait for twice as many at once


@dataclasses.dataclass(frozen=True)
class StreamK:
    """What the blocks of a product do if each takes equally many chains of steps, of one tile after another.

    A block begins with its last tile: if another block has that tile's last chains, it need not wait for the sums.
    Blocks are begun in order, so that those before the one that waits run.

    Attributes:
      blocks: at work together.
      tiles: of outputs and tokens.
      chains: of a tile.
      unroll: steps of a chain.
    """

    blocks: int
    tiles: int
    chains: int
    unroll: int

    @property
    def senders(self) -> int:
        """How many blocks' sums another block adds to its own at most."""
        return min(-(-self.blocks // self.tiles), self.blocks - 1)

    @property
    def most_steps(self) -> int:
        """Of a block."""
        return -(-self.tiles * self.chains // self.blocks) * self.unroll

    def begin(self, block: Any) -> Any:
        """The first of a block's chains, counted through all tiles; that of the next block is where it ends."""
        return jax.lax.div(block * (self.tiles * self.chains), jnp.int32(self.blocks))

    def pieces(self, block: Any) -> Any:
        """Of how many tiles a block has chains."""
        chains = jnp.int32(self.chains)
        return jax.lax.div(self.begin(block + 1) - 1, chains) - jax.lax.div(self.begin(block), chains) + 1

    def piece(self, i: Any, block: Any) -> tuple[Any, Any, Any, Any]:
        """A block's piece i.

        Returns:
          Its tile, the first of the tile's steps that it has, how many, and the block's steps before it.
        """
        first, end = self.begin(block), self.begin(block + 1)
        tile = jax.lax.div(end - 1, jnp.int32(self.chains)) - i
        its_first = jnp.maximum(first, tile * self.chains)
        its_end = jnp.minimum(end, (tile + 1) * self.chains)
        return (
            tile,
            (its_first - tile * self.chains) * self.unroll,
            (its_end - its_first) * self.unroll,
            (end - its_end) * self.unroll,
        )

    def first_block(self, tile: Any) -> Any:
        """The first one that has chains of a tile."""
        chain = tile * self.chains
        return jax.lax.div((chain + 1) * self.blocks - 1, jnp.int32(self.tiles * self.chains))


def plan_stream(t: Tiling, tiles: int, steps: int) -> StreamK:
    """For tiles of so many steps; behind the last one inputs are read as zeros."""
    chains = -(-steps // t.unroll)
    return StreamK(min(STREAMING_MULTIPROCESSORS, tiles * min(chains, MAX_SENDERS)), tiles, chains, t.unroll)


def plan_rounds(t: Tiling, row_blocks: int, token_tiles: int, steps: int) -> Rounds:
    """Divides the last tiles if there are no more than clusters, and enough steps to divide.

    Args:
      t: a tiling; one with ``split`` or ``teams`` must not be persistent.
      row_blocks: blocks of outputs.
      token_tiles: tiles of tokens.
      steps: of 128 inputs.
    """
    groups = -(-row_blocks // t.share) * token_tiles
    clusters = STREAMING_MULTIPROCESSORS // t.share if t.persistent else groups
    whole, left = divmod(groups, clusters)
    divided = left * t.share
    part_steps = -(-steps // (t.share * t.unroll)) * t.unroll
    if t.share == 1 or not t.persistent or not 0 < divided <= clusters or part_steps >= steps:
        return Rounds(t.share, min(clusters, groups), -(-groups // clusters), 0, steps, 0)
    # Chains of equal length; inputs behind the last one are read as zeros.
    whole_steps = -(-steps // t.unroll) * t.unroll
    return Rounds(t.share, clusters if whole else divided, whole, divided, whole_steps, part_steps)


def tiling_by_rule(m: int, n: int, k: int, tile_bytes: int) -> Tiling:
    """A tiling for ``[m, k] x [n, k]``, by rules that follow from measurements on an H100 and an H200."""
    if m > 64:
        tiling = min(MANY_TOKENS, key=lambda t: estimated_microseconds(t, m, n, k))
    else:
        tiling = few_tokens_tiling(next(t for t in (8, 16, 32, 64) if t >= m), n, -(-k // TILE_K))
    while tiling.shared_memory(tile_bytes) > SHARED_MEMORY and tiling.stages > 2 * tiling.teams:
        tiling = dataclasses.replace(tiling, stages=tiling.stages - tiling.teams)
    return tiling


ENOUGH_BLOCKS = 96  # that keep the memory busy


@dataclasses.dataclass(frozen=True)
class FewTokensCost:
    """What tiles of few tokens cost on an H200, in microseconds.

    Attributes:
      start: of a block, before its first step and behind its last one.
      side: of a step of a warpgroup, where four are at work on a multiprocessor.
      lone_side: where there are two, which cannot hide what a step waits for.
      stream_start: of a block that adds up with others through global memory.
    """

    start: float
    side: float
    lone_side: float
    stream_start: float


FEW_TOKENS_COST = {
    8: FewTokensCost(3.4, 0.110, 0.145, 4.3),
    16: FewTokensCost(3.4, 0.110, 0.145, 4.3),
    32: FewTokensCost(3.6, 0.115, 0.145, 5.2),
    64: FewTokensCost(3.4, 0.175, 0.167, 6.2),
}
SPLIT_MICROSECONDS = 0.8  # that it takes to add up in a cluster
STREAM_MARGIN = 1.03  # by which adding up through global memory must be faster to be chosen


def few_tokens_tiling(tokens: int, n: int, steps: int) -> Tiling:
    """For up to 64 tokens: equally many steps for all multiprocessors where that saves more than adding up costs."""
    stream = Tiling(tokens, 6 if tokens == 64 else 8, halves=1, unroll=2, stream_k=True)
    whole = whole_tiles_tiling(tokens, n, steps)
    faster = STREAM_MARGIN * few_tokens_microseconds(stream, n, steps) < few_tokens_microseconds(whole, n, steps)
    return stream if faster else whole


def few_tokens_microseconds(t: Tiling, n: int, steps: int) -> float:
    """What a product of up to 64 tokens takes about."""
    cost, tiles = FEW_TOKENS_COST[t.tokens], -(-n // t.outputs)
    if t.stream_k:
        return cost.stream_start + plan_stream(t, tiles, steps).most_steps * t.sides * cost.lone_side
    rounds = -(-tiles * t.split // STREAMING_MULTIPROCESSORS)
    side = cost.lone_side if rounds * t.sides * t.teams == 2 else cost.side
    return cost.start + rounds * t.sides * -(-steps // t.split) * side + (t.split > 1) * SPLIT_MICROSECONDS


def whole_tiles_tiling(tokens: int, n: int, steps: int) -> Tiling:
    """For up to 64 tokens, which take as long as the weight needs to be read: as many blocks as read at full speed."""
    blocks, narrow = -(-n // BLOCK_N), -(-n // TILE_N)
    tiling = Tiling(tokens, 8, halves=1, unroll=2, persistent=False)
    if blocks >= ENOUGH_BLOCKS:
        if blocks <= STREAMING_MULTIPROCESSORS and tokens < 64 and steps >= 4:
            return dataclasses.replace(tiling, teams=2)  # for as many warps as two blocks to a multiprocessor have
        # Few stages where two blocks run on a multiprocessor: more in flight makes some of them fall behind.
        return tiling if tokens == 64 else dataclasses.replace(tiling, stages=4 if tokens == 32 else 6)
    split = 1 if narrow >= ENOUGH_BLOCKS else 2
    if narrow * split <= STREAMING_MULTIPROCESSORS:  # of 64 outputs, one to a multiprocessor, with more in flight
        split = split if steps >= 4 * split else 1
        teams, stages = (4, 16) if tokens <= 16 and steps >= 32 * split else (2, 12)
        return dataclasses.replace(tiling, stages=stages, split=split, teams=teams, sides=1)
    # Two teams in each of two blocks add up faster than four blocks.
    teams = 2 if tokens >= 16 and 2 * blocks < ENOUGH_BLOCKS else 1
    split = 2 if steps >= 4 * teams else 1
    return dataclasses.replace(tiling, stages=6 if tokens == 64 and teams == 2 else 8, split=split, teams=teams)


# Tilings for more than 64 tokens, in order of preference.
MANY_TOKENS = [
    *(Tiling(tokens, stages, share=share) for tokens, stages in ((256, 4), (128, 6)) for share in (1, 2)),
    Tiling(128, 4, stream_k=True),
]
STEP_MICROSECONDS = {256: 0.8, 128: 0.5}  # of a tile of so many tokens
DIVIDING_MICROSECONDS = 3  # that it takes to bring the parts of a tile together
STREAM_MICROSECONDS = 6  # the same, through global memory


def estimated_microseconds(t: Tiling, m: int, n: int, k: int) -> float:
    """What rounds of such tiles take, but for what all tilings have in common."""
    row_blocks, token_tiles = -(-n // BLOCK_N), -(-m // t.tokens)
    if row_blocks < t.share:
        return math.inf
    if t.stream_k:
        steps = plan_stream(t, row_blocks * token_tiles, -(-k // TILE_K)).most_steps
        return steps * STEP_MICROSECONDS[t.tokens] + STREAM_MICROSECONDS
    plan = plan_rounds(t, row_blocks, token_tiles, -(-k // TILE_K))
    steps = plan.whole * plan.steps + plan.part_steps
    # Copying tokens once for two blocks saves power, but has them wait for each other.
    sharing = 1 if t.share == 1 else 1.03 if token_tiles == 1 else 0.98
    return steps * STEP_MICROSECONDS[t.tokens] * sharing + bool(plan.divided) * DIVIDING_MICROSECONDS


@dataclasses.dataclass(frozen=True)
class Streaming:
    """How the product is cut into pieces.

    Attributes:
      slots: shares of tiles that each warp has room for; all but the one it works on are on their way.
      team: warps that share a unit: 4, 8 or 16.
      rounds: tiles of each warp, per unit, whose inputs shared memory holds; where that is not all of them, the units
        are gone through several times.
      halves: whether shared memory holds the inputs as float16, not e4m3, so that no loop converts them.
    """

    slots: int
    team: int
    rounds: int
    halves: bool

    def parts(self, k: int) -> int:
        """How often the units are gone through."""
        return -(-k // (TILE_K * self.team * self.rounds))

    def inputs_pitch(self) -> int:
        """Bytes from a token's inputs to the next one's: so that what a load takes lies in different banks."""
        return self.rounds * self.team * TILE_K * (2 if self.halves else 1) + (64 if self.halves else 16)

    def steps(self) -> int:
        """Tiles of a warp that are written out one behind another: a divisor of ``rounds``, so that a loop does all.

        One of four to eight if there is one, else the largest up to sixteen.
        """
        divisors = [i for i in range(1, 17) if self.rounds % i == 0]
        return max([i for i in divisors if 4 <= i <= 8] or divisors)

    def turns(self, n: int) -> int:
        """Units of each team of a block."""
        return -(-n // (UNIT * STREAMING_MULTIPROCESSORS * WARPS // self.team))

    def shared_memory(self, m: int, n: int, k: int, share: int) -> int:
        """Bytes of shared memory for a weight of such shares, rounded up array by array as the compiler does."""
        sums = 4 * SUMS_PITCH * 8 * -(-m // 8)
        arrays = [
            m * self.inputs_pitch(),
            2 * WARPS * sums,
            self.slots * WARPS * share,
            self.slots * WARPS * 8,
            WARPS * 4,
            self.turns(n) * WARPS // self.team * sums if self.parts(k) > 1 else 0,
        ]
        return sum(-(-size // 1024) * 1024 for size in arrays)


def rounds_its_input(cut: Streaming | None, m: int, k: int, gated: bool) -> bool:
    """Whether the matvec kernel can take the inputs before their rounding, all held as float16.

    One token's; or those of up to four, unless a gate is to be opened first: all blocks do that for themselves, and
    what a gate is made of would take them longer to read than a kernel takes that does it once.
    """
    if cut is None or cut.parts(k) > 1 or not cut.halves:
        return False
    if m == 1:
        return k <= MAX_INPUTS_OF_ONE
    return m <= 4 and not gated and rows_at_once(m) * k <= MAX_INPUTS_OF_SEVERAL


def rows_at_once(m: int) -> int:
    """Of a block of threads, that rounds so many tokens: a power of two."""
    return 1 << (m - 1).bit_length()


LONG_UNIT = 16  # tokens times tiles of a warp and unit, above which a third slot is faster


def streaming_by_rule(m: int, n: int, k: int, share: int) -> Streaming | None:
    """Cuts for up to 8 tokens; None for more, of which the other kernel has the inputs copied.

    Of all teams those whose warps have the fewest tiles to go through; then as few parts as possible, float16 if that
    fits, and three slots where a unit keeps a warp busy for long: several tokens times its tiles of a unit.
    """
    if not 1 <= m <= FEW_TOKENS // 2:
        return None

    def tiles_of_a_warp(team: int) -> int:
        return Streaming(2, team, 1, True).turns(n) * -(-k // (TILE_K * team))

    team = min((8, 16, 4), key=tiles_of_a_warp)
    all_rounds = -(-k // (TILE_K * team))
    cuts = (
        Streaming(slots, team, -(-all_rounds // parts), halves)
        for parts in range(1, all_rounds + 1)
        for halves in (True, False)
        for slots in ((3, 2) if m > 1 and m * -(-all_rounds // parts) > LONG_UNIT else (2,))
    )
    return next((cut for cut in cuts if cut.shared_memory(m, n, k, share) <= SHARED_MEMORY), None)


@dataclasses.dataclass(frozen=True)
class DecodeCut:
    """How the cache of a sequence and kv head is cut into pieces.

    Attributes:
      splits: blocks that share its slots.
      warps: of a block, 4 or 8.
      depth: tiles of each warp that are on their way or at work.
    """

    splits: int
    warps: int = 4
    depth: int = 2


def choose_decode_cut(batch: int, kv_heads: int, slots: int) -> DecodeCut:
    """What was fastest among the shapes that were tried (docs/kernels.md), for a cache that is full.

    Blocks of one wave need no second kernel if there is one per multiprocessor; where there are several, finer pieces
    leave less of the device idle at the end. Else as many splits as run at once, two blocks per multiprocessor, each
    with two tiles per warp or more, or one where that would leave few splits.
    """
    pairs = batch * kv_heads
    if pairs > STREAMING_MULTIPROCESSORS:
        return DecodeCut(2 if slots >= 2048 else 1)
    if pairs >= 3 * STREAMING_MULTIPROCESSORS // 4:
        return DecodeCut(1, warps=8)
    rounds = -(-slots // (4 * DECODE_TILE))
    wanted = min(2 * STREAMING_MULTIPROCESSORS // pairs, max(8, rounds // 2), rounds)
    return DecodeCut(-(-rounds // -(-rounds // wanted)))

"""How the Hopper kernels are cut into pieces."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.weight_layout import SHARE_N, TILE_K, TILE_N

BLOCK_N = 2 * TILE_N
SHARED_MEMORY = 232448  # of a block at most
MULTIPROCESSOR_SHARED_MEMORY = 228 << 10  # of all blocks, each of which takes a kilobyte more than it asks for
STREAMING_MULTIPROCESSORS = 132
FLAGS = 2 * STREAMING_MULTIPROCESSORS  # of the two warpgroups of every block
FEW_TOKENS_OF_TILES = 64  # up to which the weight's bytes decide what a product takes, not the tensor cores
SIZES_APART = 32  # tokens, from one size of the larger tiles to the next
MOST_ROUNDED = 4  # tokens that the matvec kernel rounds itself
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
      split: blocks that share the inputs of a tile and add up in their shared memory.
      teams: warpgroups, or pairs of them, in a block that take turns at its steps and add up in shared memory.
      share: blocks, 1 or 2, that take the same tokens and copy them once; and the last tiles together, if there are too
        few for all blocks (:func:`plan_rounds`).
      persistent: a block per multiprocessor that works through many tiles, instead of a block per tile.
      stream_k: whether the persistent blocks take equally many steps each, whatever tiles these are of, and those that
        have parts of a tile add up through global memory (stream-K, arXiv 2301.03598); for blocks of one team with two
        sides that share and split nothing.
      sides: warpgroups of a team, 1 to 4, with 64 outputs each. With one, steps are copied in pairs, for two teams or
        another even number, and blocks do not share tokens. With three or four, a block has one team and takes all
        tokens, at most 192 or 128, in one half. With three, steps are copied in pairs, too, and a block's outputs may
        be of several weights.

    Raises:
      ValueError: more than 64 tokens do not divide among ``split · teams``: that is no power of two, or each's part no
        multiple of 16. Three sides have several teams or halves, ``stream_k``, an odd number of stages or fewer than
        four, or an odd ``unroll``.
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

    def __post_init__(self) -> None:
        if self.divides_sums and (self.parts.bit_count() > 1 or self.tokens % (16 * self.parts)):
            raise ValueError(
                f"{self.tokens} tokens cannot be divided among split · teams = {self.parts}, "
                "which must be a power of two with a multiple of 16 for each"
            )

        divided = self.teams > 1 or self.halves > 1 or self.stream_k
        if self.sides == 3 and (divided or self.stages % 2 or self.stages < 4 or self.unroll % 2):
            raise ValueError(
                "three sides need one team, one half, no stream_k, an even number of stages, at least four, "
                f"and an even unroll: {self}"
            )

    @property
    def outputs(self) -> int:
        """Of a block's tile."""
        return self.sides * TILE_N

    @property
    def at_once(self) -> int:
        """Steps that are copied together: copies are of whole 128 bytes, which odd numbers of tiles may not be."""
        return 1 + self.sides % 2

    @property
    def begins_alone(self) -> bool:
        """Whether a block's first two steps are copied each alone: of a pair that a team takes, one is needed first."""
        return self.at_once > 1 and self.teams == 1

    @property
    def parts(self) -> int:
        """Blocks and teams that take every so manieth step of a tile each."""
        return self.split * self.teams

    @property
    def divides_sums(self) -> bool:
        """Whether each of those who add up brings together the sums of a part of the tokens, and writes these.

        Of few tokens the first one does it for all.
        """
        return self.parts > 1 and self.tokens > FEW_TOKENS_OF_TILES

    @property
    def writers(self) -> int:
        """Warpgroups of a block that write results of the same tile."""
        return self.sides * (self.teams if self.divides_sums else 1)

    @property
    def part(self) -> int:
        """Tokens of a tile whose sums one block or team brings together where several do; else of a tile.

        With ``share`` it is those of the last tiles that two blocks take together.
        """
        return self.tokens // (self.parts if self.divides_sums else self.share)

    @property
    def written(self) -> int:
        """Tokens that a warpgroup writes at once, at most."""
        return self.part if self.divides_sums else self.tokens

    def shared_memory(self, tile_bytes: int) -> int:
        """Bytes of shared memory for a weight of such tiles, at most; rounded up array by array, as compilers do."""
        arrays = [
            self.stages * self.tokens * TILE_K,
            self.stages * self.sides * tile_bytes,
            self.writers * self.written * TILE_N * 2,
            0 if self.divides_sums else (self.split + self.teams - 2) * self.tokens * self.outputs * 4,
            2 * (self.stages + 1) * 8,
            8 if self.split > 1 or self.share > 1 else 0,
            24 if self.begins_alone else 0,
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
    return m <= MOST_ROUNDED and not gated and rows_at_once(m) * k <= MAX_INPUTS_OF_SEVERAL


def rows_at_once(m: int) -> int:
    """Of a block of threads, that rounds so many tokens: a power of two."""
    return 1 << (m - 1).bit_length()


@dataclasses.dataclass(frozen=True)
class DecodeCut:
    """How the cache of a sequence and kv head is cut into pieces.

    Attributes:
      splits: blocks that share its slots.
      warps: of a block, 4 or 8.
      depth: tiles of each warp that are on their way or at work.
      clustered: whether the splits are a cluster, of up to 8 blocks, that merges their results in its shared memory;
        else a second kernel does.
      resident: blocks that a multiprocessor holds at most; of four warps and heads of 128 four find place.
    """

    splits: int
    warps: int = 4
    depth: int = 2
    clustered: bool = False
    resident: int = 4


LARGEST_CLUSTER = 8  # blocks, that every Hopper GPU runs together
CLUSTERED_SLOTS = 2048  # up to which clusters of more than two blocks are faster than a second kernel
SHORT_SLOTS, FEW_BLOCKS = 1536, 64  # up to which clusters of so many blocks altogether are faster than more
MOST_SPLITS, SLOTS_OF_SPLIT = 5, 1000  # at most, and at least, where sequences and kv heads keep the device busy
# What a multiprocessor takes for a slot of 128 channels of each of one block, two, three and four that it holds, on an
# H200, in microseconds, by the warps of a block.
SLOT_MICROSECONDS = {4: (0.00502, 0.00805, 0.01164, 0.0159), 8: (0.00377, 0.00769)}
# Of a block of eight warps, whose results are more to merge; of blocks that begin where others have ended; and of a
# second kernel.
EIGHT_WARPS_MICROSECONDS, NEXT_MICROSECONDS, MERGING_MICROSECONDS = 0.7, 1.8, 2.9


def decode_microseconds(cut: DecodeCut, pairs: int, work: float) -> float:
    """What attention over so many sequences and kv heads takes about, beyond what all cuts take.

    The fullest multiprocessor has its blocks in turns, of as many as it holds. How long a turn takes depends on how
    many these are: more hide each other's waiting, up to what memory gives.

    Args:
      cut: not clustered.
      pairs: of a sequence and a kv head.
      work: slots of each, in such of 128 channels.
    """
    of_slot = SLOT_MICROSECONDS[cut.warps]
    resident = min(cut.resident, len(of_slot))
    turns, left = divmod(-(-pairs * cut.splits // STREAMING_MULTIPROCESSORS), resident)
    counts = [resident] * turns + [left] * (left > 0)
    return (
        sum(of_slot[count - 1] for count in counts) * work / cut.splits
        + NEXT_MICROSECONDS * (len(counts) - 1)
        + EIGHT_WARPS_MICROSECONDS * (cut.warps == 8)
        + MERGING_MICROSECONDS * (cut.splits > 1)
    )


def fewest_splits(rounds: int, most: int) -> int:
    """Of a full cache, with as many rounds for the longest as ``most`` splits have: so that none is without work."""
    return -(-rounds // -(-rounds // most))


def choose_decode_cut(batch: int, kv_heads: int, head_dim: int, slots: int) -> DecodeCut:
    """What was fastest among the shapes that were tried (docs/kernels.md), for a cache that is full.

    Where sequences and kv heads are more than half of the multiprocessors, the cut of which
    :func:`decode_microseconds` expects the least: more splits are finer, but are merged by a second kernel, and fewer
    blocks at once may go up in turns where more would leave some multiprocessor a block more than others. A cluster of
    two serves those that are fewer, but fill the device so. Still fewer are cut into as many splits as run at once, two
    blocks per multiprocessor, each with two tiles per warp or more, or one where that would leave few splits. A second
    kernel merges these, which takes 2 us, or, where they are short, a cluster, whose blocks begin together or not at
    all; of the shortest, clusters of fewer blocks.
    """
    pairs, rounds = batch * kv_heads, -(-slots // (4 * DECODE_TILE))
    if 2 * pairs > STREAMING_MULTIPROCESSORS:
        most = max(1, min(MOST_SPLITS, slots // SLOTS_OF_SPLIT))
        splits = {fewest_splits(rounds, wanted) for wanted in range(1, most + 1)}
        cuts = [DecodeCut(number, resident=resident) for number in sorted(splits) for resident in (4, 3)]
        if pairs <= len(SLOT_MICROSECONDS[8]) * STREAMING_MULTIPROCESSORS:
            cuts.append(DecodeCut(1, warps=8))
        return min(cuts, key=lambda cut: decode_microseconds(cut, pairs, slots * head_dim / 128))
    if 8 * pairs >= 3 * STREAMING_MULTIPROCESSORS:
        return DecodeCut(min(2, rounds), warps=4 if slots < 2048 else 8, clustered=rounds > 1)
    if slots <= CLUSTERED_SLOTS:
        wanted = max(2, FEW_BLOCKS // pairs) if slots <= SHORT_SLOTS else 2 * STREAMING_MULTIPROCESSORS // pairs
        number = min(wanted, LARGEST_CLUSTER, rounds)
        return DecodeCut(number, clustered=number > 1)
    wanted = min(2 * STREAMING_MULTIPROCESSORS // pairs, max(8, rounds // 2), rounds)
    return DecodeCut(fewest_splits(rounds, wanted))

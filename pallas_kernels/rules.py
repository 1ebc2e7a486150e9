"""How products are cut where nobody measured: cost models, whose numbers are fits to what an H100 and an H200 took."""

import dataclasses
import math

from pallas_kernels.tiling import (
    BLOCK_N,
    FEW_TOKENS,
    FEW_TOKENS_OF_TILES,
    SHARED_MEMORY,
    SIZES_APART,
    STREAMING_MULTIPROCESSORS,
    Streaming,
    Tiling,
    plan_rounds,
    plan_stream,
)
from pallas_kernels.weight_layout import TILE_K, TILE_N


def tiling_by_rule(m: int, n: int, k: int, tile_bytes: int) -> Tiling:
    """A tiling for ``[m, k] x [n, k]``, by rules that follow from measurements on an H100 and an H200."""
    if m > FEW_TOKENS_OF_TILES:
        tiling = min(MANY_TOKENS, key=lambda t: estimated_microseconds(t, m, n, k))
    else:
        tiling = few_tokens_tiling(next(t for t in FEW_TOKENS_COST if t >= m), n, -(-k // TILE_K))
    fewer = tiling.teams if tiling.persistent else 2 * tiling.teams  # stages, that chains of steps still divide
    while tiling.shared_memory(tile_bytes) > SHARED_MEMORY and tiling.stages > fewer + tiling.teams:
        tiling = dataclasses.replace(tiling, stages=tiling.stages - fewer)
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


FEW_TOKENS_COST = {  # of tiles of so many tokens, upwards
    8: FewTokensCost(2.05, 0.138, 0.133, 4.7),
    16: FewTokensCost(2.05, 0.138, 0.133, 4.7),
    32: FewTokensCost(2.1, 0.145, 0.140, 4.95),
    64: FewTokensCost(3.1, 0.155, 0.144, 6.75),
}
SPLIT_MICROSECONDS = 0.97  # that it takes to add up in a cluster
MARGIN = 1.03  # by which something else must be faster than whole tiles to be chosen


def few_tokens_tiling(tokens: int, n: int, steps: int) -> Tiling:
    """For up to 64 tokens: equally many steps for all multiprocessors where that saves more than adding up costs.

    Or many blocks of 64 outputs, of which up to four run on a multiprocessor.
    """
    others = [Tiling(tokens, 6 if tokens == 64 else 8, halves=1, unroll=2, stream_k=True)]
    if tokens <= 16:
        others.append(Tiling(tokens, 8, halves=1, unroll=2, persistent=False, teams=2, sides=1))
    whole = whole_tiles_tiling(tokens, n, steps)
    other = min(others, key=lambda t: few_tokens_microseconds(t, n, steps))
    faster = MARGIN * few_tokens_microseconds(other, n, steps) < few_tokens_microseconds(whole, n, steps)
    return other if faster else whole


def few_tokens_microseconds(t: Tiling, n: int, steps: int) -> float:
    """What a product of up to 64 tokens takes about."""
    cost, tiles = FEW_TOKENS_COST[t.tokens], -(-n // t.outputs)
    if t.stream_k:
        return cost.stream_start + plan_stream(t, tiles, steps).most_steps * t.sides * cost.lone_side
    rounds = max(1.0, tiles * t.split / STREAMING_MULTIPROCESSORS)
    side = cost.lone_side if rounds == 1 and t.sides * t.teams == 2 else cost.side
    # Of several blocks those on the fullest multiprocessor are not slowed down by all others all of the time.
    rounds = (rounds + math.ceil(rounds)) / 2
    return cost.start + rounds * t.sides * -(-steps // t.split) * side + (t.split > 1) * SPLIT_MICROSECONDS


def whole_tiles_tiling(tokens: int, n: int, steps: int) -> Tiling:
    """For up to 64 tokens, which take as long as the weight needs to be read: as many blocks as read at full speed."""
    blocks, narrow = -(-n // BLOCK_N), -(-n // TILE_N)
    tiling = Tiling(tokens, 8, halves=1, unroll=2, persistent=False)
    if blocks >= ENOUGH_BLOCKS:
        if blocks > STREAMING_MULTIPROCESSORS:
            # Few stages where two blocks run on a multiprocessor: more in flight makes some of them fall behind.
            return dataclasses.replace(tiling, stages=4 if tokens >= 32 else 6)
        # Else two teams, for as many warps as two blocks to a multiprocessor have.
        return dataclasses.replace(tiling, teams=2) if tokens < 64 and steps >= 4 else tiling
    split = 1 if narrow >= ENOUGH_BLOCKS else 2
    if narrow * split <= STREAMING_MULTIPROCESSORS:  # of 64 outputs, one to a multiprocessor, with more in flight
        split = split if steps >= 4 * split else 1
        return dataclasses.replace(tiling, stages=12, split=split, teams=2, sides=1)
    # Two teams in each of two blocks add up faster than four blocks.
    teams = 2 if tokens >= 16 and 2 * blocks < ENOUGH_BLOCKS else 1
    split = 2 if steps >= 4 * teams else 1
    return dataclasses.replace(tiling, stages=6 if tokens == 64 and teams == 2 else 8, split=split, teams=teams)


STAGES = dict(zip(range(96, 257, SIZES_APART), (8, 6, 6, 5, 4, 4), strict=True))  # of tiles of so many tokens
# Of such a tile's 128 outputs.
STEP_MICROSECONDS = {96: 0.365, 128: 0.41, 160: 0.475, 192: 0.56, 224: 0.62, 256: 0.685}
FOUR_SIDED_MICROSECONDS = {96: 0.53, 128: 0.68}  # the same of 256 outputs
LONE_STAGES = {96: 8, 128: 8, 160: 6, 192: 5, 224: 4, 256: 4}  # where a block has one tile
LONE_MICROSECONDS = {96: 0.28, 128: 0.335, 160: 0.42, 192: 0.5, 224: 0.58, 256: 0.646}
NARROW_STAGES = {96: 12, 128: 10}  # of 64 outputs
NARROW_MICROSECONDS = {96: 0.16, 128: 0.196}
# Tilings for more than 64 tokens, in order of preference.
MANY_TOKENS = [
    *(Tiling(tokens, stages, share=share) for tokens, stages in STAGES.items() for share in (1, 2)),
    Tiling(256, 4, halves=1, unroll=2, share=2),
    *(Tiling(tokens, 4, halves=1, unroll=2, sides=4) for tokens in FOUR_SIDED_MICROSECONDS),
    *(
        Tiling(tokens, stages, halves=halves, unroll=unroll, split=split, persistent=False)
        for tokens, stages in LONE_STAGES.items()
        for halves, unroll in ((1, 2), (2, 4))
        for split in (1, 2)
        if halves == 1 or tokens > 128
    ),
    *(
        Tiling(tokens, stages, halves=1, unroll=2, split=split, persistent=False, teams=2, sides=1)
        for tokens, stages in NARROW_STAGES.items()
        for split in (1, 2)
        if tokens % (32 * split) == 0
    ),
    *(Tiling(tokens, min(stages, 6), stream_k=True) for tokens, stages in STAGES.items()),
    Tiling(256, 4, unroll=2, stream_k=True),
    *(Tiling(tokens, 8, halves=1, unroll=2, stream_k=True) for tokens in (96, 128)),
]


@dataclasses.dataclass(frozen=True)
class ManyTokensCost:
    """What tiles of many tokens cost beside their steps on an H200, in microseconds.

    Attributes:
      start: of a persistent block; of others, nothing beside what a round costs.
      sharing_start: of one that shares tokens with another block.
      round: of each tile that a block takes, before its first step and behind its last one.
      dividing: of a cluster that brings together the parts of a tile, and for each token of it.
      streaming: the same of all blocks, through global memory.
    """

    start: float
    sharing_start: float
    round: float
    dividing: tuple[float, float]
    streaming: tuple[float, float]


# Of blocks, persistent or not, that divide steps equally or do not: where more are worth it at all.
MOST_ROUNDS = {(True, False): math.inf, (False, False): 1, (True, True): 3}
MANY_TOKENS_COST = ManyTokensCost(1.5, 2.9, 1.25, (0.7, 0.0105), (2.6, 0.0325))


def estimated_microseconds(t: Tiling, m: int, n: int, k: int) -> float:
    """What a product of many tokens takes about."""
    cost = MANY_TOKENS_COST
    row_blocks, token_tiles, steps = -(-n // t.outputs), -(-m // t.tokens), -(-k // TILE_K)
    tiles = row_blocks * token_tiles
    if row_blocks < t.share or tiles > MOST_ROUNDS[t.persistent, t.stream_k] * STREAMING_MULTIPROCESSORS:
        return math.inf
    step = (FOUR_SIDED_MICROSECONDS if t.sides == 4 else STEP_MICROSECONDS)[t.tokens]
    if not t.persistent:
        if tiles * t.split > STREAMING_MULTIPROCESSORS:
            return math.inf
        step = (NARROW_MICROSECONDS if t.sides == 1 else LONE_MICROSECONDS)[t.tokens]
        return 3.2 + (t.teams > 1) * 0.3 + (t.split > 1) * 1 + -(-steps // t.split) * step
    if t.stream_k:
        most_steps = plan_stream(t, tiles, steps).most_steps
        return cost.streaming[0] + cost.streaming[1] * t.tokens + most_steps * step
    if not t.persistent:
        return cost.round + steps * step
    plan = plan_rounds(t, row_blocks, token_tiles, steps)
    # Copying tokens once for two blocks saves power.
    sharing = 0.97 if t.share == 2 and token_tiles > 1 else 1
    together = cost.dividing[0] + cost.dividing[1] * t.tokens if plan.divided else 0
    start = cost.sharing_start if t.share == 2 else cost.start
    return start + plan.whole * (cost.round + plan.steps * step * sharing) + plan.part_steps * step + together


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

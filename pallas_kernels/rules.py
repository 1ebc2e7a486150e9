"""How products are cut where nobody measured: cost models, whose numbers are fits to what an H100 and an H200 took."""

import dataclasses
import math
from typing import Any

from pallas_kernels.tiling import (
    BLOCK_N,
    FEW_TOKENS,
    FEW_TOKENS_OF_TILES,
    MOST_ROUNDED,
    SHARED_MEMORY,
    SIZES_APART,
    STREAMING_MULTIPROCESSORS,
    Streaming,
    Tiling,
    plan_rounds,
    plan_stream,
)
from pallas_kernels.weight_layout import SHARES, TILE_K, TILE_N

MANY_INPUTS = 4096  # from which on five to eight tokens are better cut into small tiles


def cut_by_rule(m: int, n: int, k: int, share: int) -> Streaming | Tiling:
    """For ``[m, k] x [n, k]`` with a weight in shares of so many bytes, of the kernel that is the faster one.

    That for few tokens is, up to 8 tokens; from 5 on not where the other has blocks of 64 outputs, of many inputs, or
    where so many inputs do not find place as float16.
    """
    streaming, tiling = streaming_by_rule(m, n, k, share), tiling_by_rule(m, n, k, SHARES * share)
    if streaming is None:
        return tiling
    in_small_tiles = tiling.sides == 1 and k >= MANY_INPUTS
    return tiling if m > MOST_ROUNDED and (in_small_tiles or not streaming.halves) else streaming


def tiling_by_rule(m: int, n: int, k: int, tile_bytes: int) -> Tiling:
    """A tiling for ``[m, k] x [n, k]``, by rules that follow from measurements on an H100 and an H200."""
    if m > FEW_TOKENS_OF_TILES:
        tiling = min(MANY_TOKENS, key=lambda t: estimated_microseconds(t, m, n, k))
    else:
        tiling = few_tokens_tiling(next(t for t in FEW_TOKENS_COST if t >= m), n, -(-k // TILE_K))
    # Stages, that chains of steps still divide.
    fewer = max(tiling.teams, tiling.at_once) if tiling.persistent else 2 * tiling.teams
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


# Of tiles of so many tokens and 128 outputs: as many stages as shared memory holds.
STAGES = dict(zip(range(96, 257, SIZES_APART), (8, 6, 6, 5, 4, 4), strict=True))
LONE_STAGES = STAGES | {128: 8, 192: 4}  # of blocks with one tile; a turn of their loop, once round, is written out
NARROW_STAGES = {64: 12, 96: 12, 128: 10}  # of tiles of 64 outputs
WIDE_STAGES = {96: 6, 128: 6, 160: 4, 192: 4}  # of tiles of 192 outputs
# A step of each, in microseconds.
STEP_MICROSECONDS = {96: 0.384, 128: 0.396, 160: 0.469, 192: 0.528, 224: 0.61, 256: 0.712}
LONE_MICROSECONDS = {96: 0.3, 128: 0.356, 160: 0.431, 192: 0.507, 224: 0.603, 256: 0.64}
NARROW_MICROSECONDS = {64: 0.138, 96: 0.156, 128: 0.21}
WIDE_MICROSECONDS = {96: 0.416, 128: 0.504, 160: 0.673, 192: 0.772}
WIDEST_MICROSECONDS = {96: 0.52, 128: 0.684}  # of tiles of 256 outputs
# How a tile's tokens are gone through. Where two blocks, or many stages, keep a multiprocessor busy, all at once.
AT_ONCE: dict[str, Any] = {"halves": 1, "unroll": 2}
# Tilings for more than 64 tokens, in order of preference.
MANY_TOKENS = [
    Tiling(256, 4, share=2, **AT_ONCE),
    *(Tiling(tokens, stages, share=share) for tokens, stages in STAGES.items() for share in (1, 2)),
    *(Tiling(tokens, 4, sides=4, **AT_ONCE) for tokens in WIDEST_MICROSECONDS),
    *(
        Tiling(tokens, stages, share=share, sides=3, **AT_ONCE)
        for tokens, stages in WIDE_STAGES.items()
        for share in (1, 2)
    ),
    *(
        Tiling(tokens, stages, split=split, persistent=False, **(AT_ONCE if tokens <= 128 else {}))
        for tokens, stages in LONE_STAGES.items()
        for split in (1, 2)
    ),
    *(
        Tiling(tokens, stages, split=split, persistent=False, teams=2, sides=1, **AT_ONCE)
        for tokens, stages in NARROW_STAGES.items()
        for split in (1, 2)
        if tokens % (32 * split) == 0
    ),
    *(Tiling(tokens, stages, split=2, persistent=False, sides=3, **AT_ONCE) for tokens, stages in WIDE_STAGES.items()),
    *(Tiling(tokens, 8, stream_k=True, **AT_ONCE) for tokens in (96, 128)),
    *(Tiling(tokens, stages, unroll=2, stream_k=True) for tokens, stages in STAGES.items() if tokens > 128),
]


@dataclasses.dataclass(frozen=True)
class ManyTokensCost:
    """What tiles of many tokens cost beside their steps on an H200, in microseconds.

    A pair is of a number and of another for each token of a tile.

    Attributes:
      start: of a persistent block.
      sharing_start: of one that shares tokens with another block.
      round: of each tile that such a block takes, before its first step and behind its last one.
      lone: of a block that has one tile.
      splitting: of two such blocks that add up.
      dividing: of a cluster that brings together the parts of one of the last tiles.
      streaming: of blocks that take equally many steps each, and add up through global memory.
      sender: of each block whose sums another one waits for, for each token of a tile.
      piece: of each tile of which such a block has steps.
      sharing: as much of a step's time is left where two blocks copy the tokens once, which saves power.
      at_once: as much of it where, besides, a tile is not halved.
      one_round: as much longer it is where persistent blocks have one tile each.
    """

    start: float
    sharing_start: float
    round: float
    lone: tuple[float, float]
    splitting: tuple[float, float]
    dividing: tuple[float, float]
    streaming: tuple[float, float]
    sender: float
    piece: float
    sharing: float
    at_once: float
    one_round: float


# Of blocks, persistent or not, that divide steps equally or do not: where more are worth it at all.
MOST_ROUNDS = {(True, False): math.inf, (False, False): 1, (True, True): 3}
MANY_TOKENS_COST = ManyTokensCost(
    start=1.934, sharing_start=3.348, round=1.059, lone=(2.508, 0.003), splitting=(0.338, 0.0033),
    dividing=(1.198, 0.0015), streaming=(2.848, 0.0091), sender=0.0029, piece=1.006,
    sharing=0.957, at_once=0.942, one_round=1,
)  # fmt: skip
WIDE_COST = dataclasses.replace(  # of tiles of 192 outputs
    MANY_TOKENS_COST, start=1.906, lone=(3.015, 0.0018), splitting=(0.91, 0.0014), dividing=(1.1, 0.009), sharing=1,
    at_once=1, one_round=1.04,
)  # fmt: skip


def estimated_microseconds(t: Tiling, m: int, n: int, k: int) -> float:
    """What a product of many tokens takes about."""
    cost = WIDE_COST if t.sides == 3 else MANY_TOKENS_COST

    def of_tokens(pair: tuple[float, float]) -> float:
        return pair[0] + pair[1] * t.tokens

    row_blocks, token_tiles, steps = -(-n // t.outputs), -(-m // t.tokens), -(-k // TILE_K)
    tiles = row_blocks * token_tiles
    waves = tiles * t.split / STREAMING_MULTIPROCESSORS
    if row_blocks < t.share or waves > MOST_ROUNDS[t.persistent, t.stream_k]:
        return math.inf
    if not t.persistent:
        step = {1: NARROW_MICROSECONDS, 2: LONE_MICROSECONDS, 3: WIDE_MICROSECONDS}[t.sides][t.tokens]
        its_steps = -(-steps // (t.parts * t.unroll)) * t.unroll * t.teams
        return of_tokens(cost.lone) + (t.split > 1) * of_tokens(cost.splitting) + its_steps * step
    step = {2: STEP_MICROSECONDS, 3: WIDE_MICROSECONDS, 4: WIDEST_MICROSECONDS}[t.sides][t.tokens]
    if t.stream_k:
        plan = plan_stream(t, tiles, steps)
        adding_up = of_tokens(cost.streaming) + cost.sender * plan.senders * t.tokens
        return adding_up + plan.most_steps * (step + cost.piece / (plan.chains * t.unroll))
    rounds = plan_rounds(t, row_blocks, token_tiles, steps)
    step *= cost.one_round if rounds.whole == 1 else 1
    together = of_tokens(cost.dividing) if rounds.divided else 0
    if t.share == 1:
        return cost.start + rounds.whole * (cost.round + rounds.steps * step)
    step *= cost.at_once if t.halves == 1 else 1
    whole = cost.round + rounds.steps * step * (cost.sharing if token_tiles > 1 else 1)
    return cost.sharing_start + rounds.whole * whole + rounds.part_steps * step + together


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

"""The cuts of the INT4 x FP8 product that tune_matmul.py tries."""

import itertools
import math
from collections.abc import Iterator

from pallas_kernels.rules import (
    FEW_TOKENS_COST,
    MANY_TOKENS,
    cut_by_rule,
    estimated_microseconds,
    streaming_by_rule,
)
from pallas_kernels.tiling import (
    FEW_TOKENS_OF_TILES,
    MOST_ROUNDED,
    SHARED_MEMORY,
    Streaming,
    Tiling,
    rounds_its_input,
)
from pallas_kernels.tuned import Cut
from pallas_kernels.weight_layout import SHARES, TILE_K

PLAUSIBLE = 1.2  # times what the fastest cut by the cost model takes


def streamings(m: int, n: int, k: int, share: int) -> Iterator[Streaming]:
    """Cuts for the kernel of few tokens; of one token those that it can round itself."""
    for team, slots in itertools.product((4, 8, 16), (2, 3)):
        rounds = math.ceil(k / (TILE_K * team))
        cuts = [Streaming(slots, team, rounds, halves) for halves in (True, False)]
        fitting = [cut for cut in cuts if cut.shared_memory(m, n, k, share) <= SHARED_MEMORY]
        yield from (cut for cut in fitting[:1] if m > 1 or rounds_its_input(cut, m, k, gated=True))


def tilings(m: int, n: int, k: int) -> Iterator[Tiling]:
    """Cuts for the other kernel: of few tokens by the inputs, of more by the tokens, or by both."""
    steps = math.ceil(k / TILE_K)
    if m <= FEW_TOKENS_OF_TILES:
        whole = next(tokens for tokens in FEW_TOKENS_COST if tokens >= m)
        for stages, (split, teams) in itertools.product((4, 6, 8), ((1, 1), (1, 2), (2, 1), (2, 2))):
            if steps >= 2 * split * teams:
                yield Tiling(whole, stages, halves=1, unroll=2, split=split, teams=teams, persistent=False)
        for (teams, stages), split in itertools.product(((2, 8), (2, 12), (4, 12), (4, 16)), (1, 2)):
            if steps >= 2 * split * teams:
                yield Tiling(whole, stages, halves=1, unroll=2, split=split, teams=teams, sides=1, persistent=False)
        for stages, unroll in ((6, 2), (8, 2), (8, 4)):
            yield Tiling(whole, stages, halves=1, unroll=unroll, stream_k=True)
        return
    estimates = {t: estimated_microseconds(t, m, n, k) for t in MANY_TOKENS}
    yield from (t for t, microseconds in estimates.items() if microseconds <= PLAUSIBLE * min(estimates.values()))


def candidates(m: int, n: int, k: int, share: int) -> list[Cut]:
    """What the rules choose for a weight ``[n, k]`` in shares of so many bytes, then all others that fit."""
    by_rule, others = cut_by_rule(m, n, k, share), list[Cut]()
    if streaming_by_rule(m, n, k, share) is not None:  # of more tokens never the faster kernel
        others += streamings(m, n, k, share)
    if m > MOST_ROUNDED:  # fewer the matvec kernel may round itself, which saves more than another could
        others += [t for t in tilings(m, n, k) if t.shared_memory(SHARES * share) <= SHARED_MEMORY]
    return [by_rule, *(cut for cut in others if cut != by_rule)]

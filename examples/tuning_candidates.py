"""The cuts of the INT4 x FP8 product that tune_matmul.py tries."""

import itertools
import math
from collections.abc import Iterator

from pallas_kernels.tiling import (
    FEW_TOKENS,
    SHARED_MEMORY,
    Streaming,
    Tiling,
    rounds_its_input,
    streaming_by_rule,
    tiling_by_rule,
)
from pallas_kernels.tuned import Cut
from pallas_kernels.weight_layout import SHARES, TILE_K

TILES = (8, 16, 32, 64, 128, 256)  # numbers of tokens that a tile may have


def streamings(m: int, n: int, k: int, share: int) -> Iterator[Streaming]:
    """Cuts for the kernel of few tokens; of one token those that it can round itself, of many in one part or two."""
    for parts, team, slots in itertools.product((1, 2) if m > 8 else (1,), (4, 8, 16), (2, 3)):
        rounds = math.ceil(math.ceil(k / (TILE_K * team)) / parts)
        cuts = [Streaming(slots, team, rounds, halves) for halves in (True, False)]
        fitting = [cut for cut in cuts if cut.shared_memory(m, n, k, share) <= SHARED_MEMORY]
        yield from (cut for cut in fitting[:1] if m > 1 or rounds_its_input(cut, m, k))


def tilings(m: int, k: int) -> Iterator[Tiling]:
    """Cuts for the other kernel: of up to 64 tokens by the inputs, of more by the tokens, or by both."""
    whole = next((tokens for tokens in TILES if tokens >= m), TILES[-1])
    if m <= 64:
        for stages, (split, teams) in itertools.product((4, 8), ((1, 1), (2, 1), (2, 2), (4, 1))):
            if math.ceil(k / TILE_K) >= 2 * split * teams:
                yield Tiling(whole, stages, halves=1, unroll=2, split=split, teams=teams, persistent=False)
        return
    sizes = [tokens for tokens in (whole, whole // 2) if tokens >= 64]
    for tokens, share in itertools.product(sizes, (1, 2)):
        yield Tiling(tokens, {256: 4, 128: 6, 64: 8}[tokens], share=share)
    if m <= 256:
        for tokens, teams in itertools.product(sizes, (1, 2)):
            yield Tiling(tokens, 4, split=2, teams=teams, persistent=False)


def candidates(m: int, n: int, k: int, share: int) -> list[Cut]:
    """What the rules choose for a weight ``[n, k]`` in shares of so many bytes, then all others that fit."""
    by_rule = streaming_by_rule(m, n, k, share) or tiling_by_rule(m, n, k, SHARES * share)
    others: list[Cut] = list(streamings(m, n, k, share)) if m <= FEW_TOKENS else []
    if m > 8:  # of fewer the first kernel was always the faster one
        others += [t for t in tilings(m, k) if t.shared_memory(SHARES * share) <= SHARED_MEMORY]
    return [by_rule, *(cut for cut in others if cut != by_rule)]

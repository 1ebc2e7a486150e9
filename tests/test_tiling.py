"""How products are cut into pieces: all of them are taken, once, and fit the device."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import rules, tiling
from pallas_kernels.tiling import Tiling


@given(st.integers(1, 20000), st.integers(1, 500), st.integers(1, 900), st.sampled_from([4160, 4224, 4352, 4608]))
def test_chosen_tilings_fit_the_device(m, n_tiles, k_groups, tile_bytes):
    chosen = rules.tiling_by_rule(m, 64 * n_tiles, 32 * k_groups, tile_bytes)
    assert chosen.shared_memory(tile_bytes) <= tiling.SHARED_MEMORY
    assert chosen.stages >= 2 * chosen.teams
    assert chosen.stages % chosen.teams == 0
    assert chosen.sides > 1 or chosen.teams % 2 == 0
    assert chosen.sides * chosen.teams <= 4
    assert chosen.split * chosen.share <= 2


@settings(max_examples=40)
@given(st.integers(1, 400), st.integers(1, 230), st.sampled_from([2, 4]))
def test_stream_k_takes_every_step_of_every_tile_once(tiles, steps, unroll):
    plan = tiling.plan_stream(Tiling(16, 4, unroll=unroll, stream_k=True), tiles, steps)
    taken = [0] * tiles
    for block in range(plan.blocks):
        before = 0
        for i in range(int(plan.pieces(block))):
            tile, first, count, earlier = map(int, plan.piece(i, block))
            assert first == taken[tile]
            assert count > 0
            assert earlier == before
            taken[tile], before = first + count, before + count
            if taken[tile] >= steps:
                assert 0 <= block - int(plan.first_block(tile)) <= plan.senders <= tiling.MAX_SENDERS
            else:
                assert i == 0  # sums that another block waits for come first
            assert (first == 0) == (int(plan.first_block(tile)) == block)
        assert before <= plan.most_steps == -(-tiles * -(-steps // unroll) // plan.blocks) * unroll
    assert taken == [-(-steps // unroll) * unroll] * tiles


@given(
    st.integers(1, 9000),
    st.integers(1, 250),
    st.integers(1, 230),
    st.sampled_from([t for t in rules.MANY_TOKENS if not t.stream_k]),
)
def test_rounds_take_every_step_of_every_tile_once(m, row_blocks, steps, how):
    """Tiles, and pairs of whole rounds in lock step: the blocks of a cluster take as many steps in each."""
    token_tiles = -(-m // how.tokens)
    plan = tiling.plan_rounds(how, row_blocks, token_tiles, steps)
    assert plan.clusters * how.share <= (132 if how.persistent else row_blocks * token_tiles)
    groups = -(-row_blocks // how.share) * token_tiles
    rounds = np.arange(plan.whole + bool(plan.divided))
    i, cluster, peer = np.meshgrid(rounds, np.arange(plan.clusters), np.arange(how.share), indexing="ij")
    exists = (i < plan.whole) & (cluster + i * plan.clusters < groups) | (i == plan.whole) & (cluster < plan.divided)
    group, beside, first, count = (np.broadcast_to(x, i.shape)[exists] for x in plan.piece(i, cluster, peer))
    taken = np.zeros((groups, how.share, plan.steps + how.share * how.unroll), int)
    for piece in zip(group, beside, first, count, strict=True):
        taken[piece[0], piece[1], piece[2] : piece[2] + piece[3]] += 1
    np.testing.assert_array_equal(taken[:, :, :steps], 1)
    assert taken.max() == 1


@given(st.integers(1, 8), st.integers(1, 2004), st.integers(1, 900), st.sampled_from([1040, 1056, 1088, 1152]))
def test_chosen_streamings_fit_the_device(m, n_tiles, k_groups, share):
    n, k = 64 * n_tiles, 32 * k_groups
    cut = rules.streaming_by_rule(m, n, k, share)
    assert cut is not None
    tiles = cut.rounds * cut.team
    inputs = m * (tiles * 256 + 64 if cut.halves else tiles * 128 + 16)
    sums = 4 * 20 * 8 * -(-m // 8)
    units = -(-n // (16 * 132 * 16 // cut.team)) * 16 // cut.team if tiles * 128 < k else 0
    slots = cut.slots * 16 * share
    assert sum(-(-size // 1024) * 1024 for size in (inputs, 32 * sums, slots, cut.slots * 128, units * sums)) <= 232448


@given(st.integers(1, 600), st.integers(1, 64), st.integers(1, 16500), st.sampled_from([64, 128]), st.integers(1, 16))
def test_chosen_cuts_of_a_cache_fit_the_device(batch, kv_heads, eights, head_dim, rows):
    """And no split of a full cache is without work, but in clusters, which serve shorter sequences better so."""
    cut = tiling.choose_decode_cut(batch, kv_heads, head_dim, 8 * eights)
    assert cut.warps in (4, 8)
    assert not cut.clustered or 2 <= cut.splits <= 8  # what every Hopper GPU places together
    rounds = -(-8 * eights // (32 * cut.warps))
    each = -(-rounds // cut.splits)
    assert cut.clustered or (cut.splits - 1) * each < rounds
    tiles = cut.warps * cut.depth * 32 * (head_dim + 4)
    results = cut.warps * 8 * -(-rows // 8) * 4 * (head_dim + 4)
    parts = -(-rows // cut.splits) * cut.splits * 4 * (head_dim + 4) if cut.clustered else 0
    room = 228 * 1024 // (cut.resident + 1)  # of which more blocks do not fit
    assert max(tiles, results, room) + parts + 2048 <= tiling.SHARED_MEMORY


@pytest.mark.parametrize("parts", [{"split": 2}, {"teams": 2}, {"split": 2, "teams": 2}])
def test_tokens_must_divide_among_those_who_add_up(parts):
    with pytest.raises(ValueError, match="104 tokens cannot be divided"):
        Tiling(104, 8, persistent=False, **parts)
    with pytest.raises(ValueError, match="power of two"):
        Tiling(144, 8, persistent=False, split=3)
    Tiling(128, 8, persistent=False, **parts)
    Tiling(8, 8, persistent=False, **parts)  # of which one writes all


@pytest.mark.parametrize(
    "changes", [{"stages": 5}, {"stages": 2}, {"unroll": 3}, {"halves": 2}, {"teams": 2}, {"stream_k": True}], ids=str
)
def test_three_sides_take_pairs_of_steps(changes):
    fitting = {"tokens": 64, "stages": 6, "halves": 1, "unroll": 2, "sides": 3}
    Tiling(**fitting)
    with pytest.raises(ValueError, match="an even number of stages"):
        Tiling(**fitting | changes)

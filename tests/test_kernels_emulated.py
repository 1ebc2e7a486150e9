"""Kernels of warp instructions, run instruction by instruction on an emulated multiprocessor, races watched."""

import jax.numpy as jnp
import numpy as np
import pytest
from emulated_gpu import emulated
from emulated_memory import Block, RaceError
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import (
    BF16,
    E4M3,
    bound_of_short_sums,
    folded,
    frobenius,
    mean_of_short_sums,
    product,
    random_tokens,
    random_weight,
    rounded_matvec,
    several_weights,
)

import pallas_kernels as pk
from pallas_kernels import (
    cluster_steps,
    decode_steps,
    first_pair,
    matmul_block,
    matmul_plan,
    matmul_steps,
    matmul_tile,
    matvec_steps,
    merge_steps,
    mosaic_decode,
    mosaic_matmul,
    mosaic_matvec,
    row_steps,
    stream_steps,
    sums_layout,
    tiling,
    warp_slots,
    weight_steps,
)
from pallas_kernels.tiling import DecodeCut, Streaming, Tiling

SUMS = cluster_steps, stream_steps, sums_layout
MATMUL = mosaic_matmul, matmul_plan, matmul_block, matmul_tile, matmul_steps, first_pair, weight_steps, *SUMS
MATVEC = mosaic_matvec, matvec_steps, warp_slots, matmul_steps, weight_steps


def check_matmul(y, x, x_scale, values, scales, tensor_scale, bias=None, rounding=2**-8):
    """Against float64: ``rounding`` is a unit of the result's bits, 0 for float32."""
    inputs = x, x_scale, values, scales, tensor_scale
    exact, y = product(*inputs, bias), np.asarray(y, np.float64)
    if scales.dtype != E4M3:
        # Sums are kept in units of the current group's scale and multiplied by ratios, float32 roundings that grow
        # with the ratio of neighbouring scales.
        np.testing.assert_allclose(y, exact, rtol=rounding, atol=1e-5 * np.abs(exact).max())
        return
    assert np.all(np.abs(y - exact) <= rounding * np.abs(exact) + bound_of_short_sums(*inputs))


@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "scale_dtype", "cut"),
    [
        (1, 64, 32, 32, E4M3, None),
        (3, 192, 576, 64, BF16, None),
        (8, 2176, 256, 128, E4M3, None),  # two units for some blocks
        (9, 64, 2432, 32, E4M3, Streaming(3, 16, 2, True)),  # two rounds, the second one not full
        (2, 128, 4480, 128, E4M3, Streaming(4, 16, 1, False)),  # inputs in three parts
        (16, 128, 2176, 64, BF16, Streaming(1, 16, 1, True)),
        (13, 64, 416, 32, BF16, Streaming(2, 4, 1, False)),  # one unit for four teams
        (5, 4288, 384, 128, E4M3, Streaming(2, 8, 1, True)),  # units for one team more than for the other
        (12, 2176, 640, 64, E4M3, Streaming(1, 4, 1, False)),  # several teams, and inputs in two parts
        (1, 64, 2432, 32, E4M3, Streaming(2, 16, 2, True)),
        (16, 4288, 384, 128, E4M3, Streaming(3, 8, 1, True)),
        (4, 128, 2432, 64, BF16, Streaming(2, 4, 5, True)),  # five steps, so that slots change places
        (2, 4288, 2304, 128, E4M3, Streaming(3, 4, 5, True)),
        (1, 128, 9216, 128, E4M3, Streaming(2, 4, 18, True)),  # a loop over parts of a unit
        (6, 2176, 4608, 64, E4M3, Streaming(3, 4, 4, False)),  # three parts, and slots that change places
    ],
)
def test_matvec(m, n, k, group_size, scale_dtype, cut):
    values, scales = random_weight(m, n, k, group_size, scale_dtype)
    x, x_scale = random_tokens(m + 1, m, k)
    tiles = pk.to_tiles(pk.pack_int4(jnp.asarray(values)), scales)
    bias = jnp.asarray(np.random.default_rng(5).normal(size=n) * 100, jnp.float32)
    with emulated(*MATVEC):
        [y] = rounded_matvec(
            x, x_scale, [tiles], [jnp.float32(0.5)], [bias],
            sizes=(n,), group_size=group_size, scale_dtype=scale_dtype, cut=cut,
        )  # fmt: skip
    expected = product(x, x_scale, values, scales, 0.5, bias)
    # Half a unit of bf16's eight bits; the sums are float32, of terms as large as the largest result.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("m", "sizes", "k", "cut", "biased"),
    [
        (1, (192, 64, 64), 640, None, ()),
        (3, (192, 64, 64), 640, None, (0, 1, 2)),
        (5, (2112, 64), 256, None, (1,)),  # two units for some blocks, of which the second is of the second weight
        (12, (64, 128), 640, Streaming(1, 4, 1, False), (0,)),  # inputs in two parts
    ],
)
def test_matvec_of_several_weights(m, sizes, k, cut, biased):
    x, x_scale = random_tokens(m + 1, m, k)
    weights, dense = several_weights(sizes, k, biased)
    expected = [product(x, x_scale, *of_weight) for of_weight in dense]
    tiles, tensor_scales, biases, _ = zip(*weights, strict=True)
    with emulated(*MATVEC):
        results = rounded_matvec(
            x, x_scale, tiles, tensor_scales, biases, sizes=sizes, group_size=128, scale_dtype=E4M3,
            out_dtype=jnp.float32 if m == 3 else BF16, cut=cut,
        )  # fmt: skip
    for y, exact in zip(results, expected, strict=True):  # tolerances as above; float32 results have but that of sums
        assert y.dtype == (jnp.float32 if m == 3 else BF16)
        step = 1e-6 if m == 3 else 2**-8
        np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=step, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "scale_dtype", "how"),
    [
        (1, 64, 32, 32, E4M3, Tiling(8, 2, halves=1, unroll=2, persistent=False)),
        (40, 192, 640, 64, BF16, Tiling(32, 3, halves=2, unroll=2)),  # several tiles, outputs behind the last
        (33, 128, 896, 128, E4M3, Tiling(64, 2, halves=2, unroll=4)),  # steps that no chain divides
        (9, 192, 1152, 128, E4M3, Tiling(16, 4, halves=1, unroll=2, persistent=False, teams=2)),
        (9, 192, 1152, 128, E4M3, Tiling(16, 4, halves=1, unroll=2, persistent=False, split=2)),
        (9, 192, 1152, 128, E4M3, Tiling(16, 6, halves=1, unroll=2, persistent=False, split=2, teams=2, sides=1)),
        (20, 192, 640, 64, BF16, Tiling(16, 8, unroll=2, persistent=False, teams=4, sides=1)),
        (9, 192, 1152, 128, E4M3, Tiling(16, 4, halves=1, unroll=2, stream_k=True)),  # tiles that many blocks divide
        (40, 576, 384, 64, BF16, Tiling(32, 3, unroll=2, stream_k=True)),  # blocks with the parts of two tiles
        (70, 448, 128, 128, E4M3, Tiling(64, 2, unroll=2, stream_k=True)),  # a chain of each, of which some have two
        (9, 192, 2304, 128, E4M3, Tiling(16, 4, halves=1, unroll=2, stream_k=True)),
        (40, 192, 640, 64, BF16, Tiling(32, 3, unroll=2, share=2)),  # tiles that two blocks divide
        (70, 448, 896, 128, E4M3, Tiling(32, 3, unroll=2, share=2)),  # some of them whole
        (40, 256, 384, 128, E4M3, Tiling(16, 3, halves=1, unroll=2, share=2)),
        (70, 320, 640, 64, BF16, Tiling(32, 3, halves=1, unroll=2, sides=4)),
        (70, 320, 640, 64, BF16, Tiling(32, 4, halves=1, unroll=2, sides=3)),  # steps in pairs, one not whole
        (40, 384, 896, 128, E4M3, Tiling(32, 6, halves=1, unroll=4, sides=3, persistent=False)),
        (70, 448, 896, 128, E4M3, Tiling(32, 4, halves=1, unroll=2, share=2, sides=3)),
        (90, 192, 640, 128, E4M3, Tiling(96, 4, halves=1, unroll=2, persistent=False, split=2, sides=3)),
        (100, 192, 640, 128, E4M3, Tiling(96, 2, unroll=2, persistent=False)),
        (170, 128, 384, 128, E4M3, Tiling(160, 2, unroll=2, persistent=False)),
        (130, 192, 1152, 128, E4M3, Tiling(64, 4, halves=1, unroll=2, persistent=False, split=2, teams=2, sides=1)),
        # Those who add up write a part of the tokens each.
        (100, 192, 640, 128, E4M3, Tiling(96, 4, unroll=2, persistent=False, teams=2, sides=1)),
        (130, 192, 1152, 128, E4M3, Tiling(128, 4, unroll=2, persistent=False, split=2, teams=2, sides=1)),
        # No room but that of the steps' inputs for the sums of others.
        (130, 192, 1152, 128, E4M3, Tiling(128, 10, unroll=2, persistent=False, split=2, teams=2, sides=1)),
        (90, 192, 640, 64, BF16, Tiling(96, 2, halves=1, unroll=2, persistent=False, split=2)),
    ],
)
def test_matmul(m, n, k, group_size, scale_dtype, how, monkeypatch):
    if n in (448, 576):  # four clusters for six pairs of tiles; seven blocks for eight tiles, or ten
        monkeypatch.setattr(tiling, "STREAMING_MULTIPROCESSORS", 7 if how.stream_k else 8)
    values, scales = random_weight(m, n, k, group_size, scale_dtype)
    x, x_scale = random_tokens(m + 1, m, k)
    tiles = pk.to_tiles(pk.pack_int4(jnp.asarray(values)), scales)
    bias = jnp.asarray(np.random.default_rng(5).normal(size=n) * 100, jnp.float32)
    for out_dtype, rounding in ((BF16, 2**-8), (jnp.float32, 0)):
        with emulated(*MATMUL):
            [y] = mosaic_matmul.matmul(
                x, x_scale, [tiles], [jnp.float32(0.5)], [bias],
                sizes=(n,), group_size=group_size, scale_dtype=scale_dtype, out_dtype=out_dtype, tiling=how,
            )  # fmt: skip
        assert y.dtype == out_dtype
        check_matmul(y, x, x_scale, values, scales, 0.5, bias, rounding)
        if scale_dtype == E4M3 and m > 1 and not rounding:  # enough numbers for a mean
            assert frobenius(y, product(x, x_scale, values, scales, 0.5, bias)) < mean_of_short_sums(k, group_size)


@st.composite
def any_product(draw):
    """Sizes, group scales, a tiling of any kind, multiprocessors for its persistent blocks, and tokens not divided."""
    tokens, unroll = draw(st.sampled_from([8, 16, 32])), draw(st.integers(2, 4))
    halves = draw(st.integers(1, 2)) if tokens > 8 else 1
    kind = draw(st.sampled_from(["alone", "narrow", "persistent", "sharing", "streaming", "wide"]))
    undivided = draw(st.sampled_from([0, 64])) if kind in ("alone", "narrow") else 64
    if kind == "alone":
        split, teams = draw(st.integers(1, 2)), draw(st.integers(1, 2))
        stages = teams * draw(st.integers(2, 4))
        if not undivided:
            tokens, stages = max(tokens, 16 * split * teams), max(stages, 4 * teams)
        how = Tiling(tokens, stages, halves, unroll, split=split, teams=teams, persistent=False)
    elif kind == "narrow":
        split, teams = draw(st.integers(1, 2)), draw(st.sampled_from([2, 4]))
        stages = teams * draw(st.integers(2, 3))
        if not undivided:
            split = split if teams == 2 else 1  # so many parts as there is memory for
            tokens = max(tokens, 16 * split * teams)
        how = Tiling(tokens, stages, 1, 2, split=split, teams=teams, sides=1, persistent=False)
    elif kind == "sharing":
        how = Tiling(max(tokens, 16), draw(st.integers(2, 4)), halves, unroll, share=2)
    else:
        stages, sides = draw(st.integers(2, 4)), draw(st.integers(3, 4)) if kind == "wide" else 2
        if sides == 3:
            stages, unroll = 2 * draw(st.integers(2, 3)), draw(st.sampled_from([2, 4]))
        how = Tiling(
            tokens, stages, 1 if kind == "wide" else halves, unroll, sides=sides, stream_k=kind == "streaming"
        )  # fmt: skip
    group_size = draw(st.sampled_from([32, 64, 128]))
    k = group_size * draw(st.integers(1, 640 // group_size))
    sizes = draw(st.integers(1, 70)), 64 * draw(st.integers(1, 5)), k
    scale_dtype, multiprocessors = draw(st.sampled_from([E4M3, E4M3, BF16])), draw(st.sampled_from([2, 4, 8]))
    return *sizes, group_size, scale_dtype, how, multiprocessors, undivided


@given(any_product(), st.integers(0, 99), st.sampled_from(["exact", "exact", "folded"]))
@settings(max_examples=20)
def test_matmul_of_any_shape(case, seed, numerics):
    m, n, k, group_size, scale_dtype, how, multiprocessors, undivided = case
    values, scales = random_weight(seed, n, k, group_size, scale_dtype)
    values[seed % n] = 0
    x, x_scale = random_tokens(seed, m, k)
    tiles = pk.to_tiles(pk.pack_int4(jnp.asarray(values)), scales)
    with pytest.MonkeyPatch.context() as patch, emulated(*MATMUL):
        patch.setattr(tiling, "STREAMING_MULTIPROCESSORS", multiprocessors)
        patch.setattr(tiling, "FEW_TOKENS_OF_TILES", undivided)
        [y] = mosaic_matmul.matmul(
            x, x_scale, [tiles], [jnp.float32(0.5)], [None], sizes=(n,), group_size=group_size,
            scale_dtype=scale_dtype, out_dtype=jnp.float32, numerics=numerics, tiling=how,
        )  # fmt: skip
    if numerics == "exact":
        check_matmul(y, x, x_scale, values, scales, 0.5, rounding=0)
    else:  # as in :func:`test_folded_matmul`
        exact = product(x, x_scale, *folded(values, scales), 0.5)
        np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=0, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("scale", [448.0, -448.0, 2.0**-9])
@pytest.mark.parametrize("value", [448.0, 2.0**-9])
@pytest.mark.parametrize("k", [512, 1280])
def test_sums_keep_their_range(k, value, scale):
    """All codes, activations and scales as large or as small as there are, so that no terms cancel."""
    m, n = 9, 64
    x, x_scale = jnp.full((m, k), value, E4M3), jnp.ones(m)
    values, scales = np.full((n, k), -8, np.int8), jnp.full((n, k // 128), scale, E4M3)
    values[:, ::64] = 7
    with emulated(*MATMUL):
        [y] = mosaic_matmul.matmul(
            x, x_scale, [pk.to_tiles(pk.pack_int4(jnp.asarray(values)), scales)], [jnp.float32(1)], [None],
            sizes=(n,), group_size=128, scale_dtype=E4M3, out_dtype=jnp.float32, tiling=Tiling(16, 4, unroll=2),
        )  # fmt: skip
    exact = product(x, x_scale, values, scales, 1.0)
    assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= bound_of_short_sums(x, x_scale, values, scales, 1.0))


@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "scale_dtype", "how"),
    [
        (1, 64, 32, 32, E4M3, Tiling(8, 2, halves=1, unroll=2, persistent=False)),
        (33, 128, 640, 64, BF16, Tiling(64, 2, halves=2, unroll=4)),
        (9, 192, 1152, 128, E4M3, Tiling(16, 4, halves=1, unroll=2, persistent=False, split=2)),
        (40, 192, 640, 128, E4M3, Tiling(32, 3, unroll=2, share=2)),  # tiles that two blocks divide
    ],
)
def test_folded_matmul(m, n, k, group_size, scale_dtype, how):
    values, scales = random_weight(m, n, k, group_size, scale_dtype)
    x, x_scale = random_tokens(m + 1, m, k)
    tiles = pk.to_tiles(pk.pack_int4(jnp.asarray(values)), scales)
    bias = jnp.asarray(np.random.default_rng(5).normal(size=n) * 100, jnp.float32)
    expected = product(x, x_scale, *folded(values, scales), 0.5, bias)
    with emulated(*MATMUL):
        [y] = mosaic_matmul.matmul(
            x, x_scale, [tiles], [jnp.float32(0.5)], [bias], sizes=(n,), group_size=group_size,
            scale_dtype=scale_dtype, out_dtype=jnp.float32, numerics="folded", tiling=how,
        )  # fmt: skip
    # Sums in float32, of terms as large as the largest result.
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("m", "sizes", "biased", "how"),
    [
        (9, (192, 64), (1,), Tiling(16, 4, halves=1, unroll=2, persistent=False)),
        (9, (192, 64), (1,), Tiling(16, 4, halves=1, unroll=2, persistent=False, teams=2, sides=1)),
        (40, (64, 192, 64), (), Tiling(32, 3, halves=2, unroll=2)),  # blocks that go through tiles of all weights
        (40, (64, 192, 64), (0, 2), Tiling(32, 3, halves=2, unroll=2, stream_k=True)),
        (40, (64, 320, 64), (0, 2), Tiling(32, 3, halves=1, unroll=2, sides=4)),
        (40, (64, 320, 192), (0, 2), Tiling(32, 4, halves=1, unroll=2, sides=3)),  # blocks with outputs of two weights
        (100, (64, 192), (1,), Tiling(96, 4, halves=1, unroll=2, persistent=False, teams=2, sides=1)),
    ],
)
def test_matmul_of_several_weights(m, sizes, biased, how):
    k = 512
    x, x_scale = random_tokens(m, m, k)
    weights, dense = several_weights(sizes, k, biased)
    tiles, tensor_scales, biases, _ = zip(*weights, strict=True)
    with emulated(*MATMUL):
        results = mosaic_matmul.matmul(
            x, x_scale, tiles, tensor_scales, biases, sizes=sizes, group_size=128, scale_dtype=E4M3, tiling=how
        )  # fmt: skip
    for y, of_weight in zip(results, dense, strict=True):
        check_matmul(y, x, x_scale, *of_weight)


@pytest.mark.parametrize(
    ("m", "n", "k", "how"),
    [
        (5, 192, 640, None),
        (13, 64, 4480, Streaming(1, 4, 4, False)),  # inputs in parts
        (9, 192, 1152, Tiling(16, 4, halves=1, unroll=2, persistent=False, teams=2)),
        (9, 192, 1152, Tiling(16, 4, halves=1, unroll=2, persistent=False, split=2, teams=2, sides=1)),
        (40, 192, 128, Tiling(32, 3, halves=2, unroll=2)),  # no chain behind which to ask for the residual
        (40, 192, 1152, Tiling(32, 3, halves=2, unroll=2, stream_k=True)),
        (70, 192, 256, Tiling(32, 2, halves=2, unroll=2)),
        (70, 320, 896, Tiling(32, 2, halves=2, unroll=2)),  # blocks with several tiles
        (70, 448, 896, Tiling(32, 3, unroll=2, share=2)),  # of which two blocks divide the last ones
        (70, 320, 896, Tiling(32, 2, halves=1, unroll=2, sides=4)),
        (70, 320, 896, Tiling(32, 4, halves=1, unroll=2, sides=3)),
        (70, 640, 896, Tiling(32, 4, halves=1, unroll=2, share=2, sides=3)),
        (130, 192, 640, Tiling(128, 4, unroll=2, persistent=False, split=2, teams=2, sides=1)),
    ],
)
def test_residual(m, n, k, how, monkeypatch):
    monkeypatch.setattr(tiling, "STREAMING_MULTIPROCESSORS", 8 if isinstance(how, Tiling) and how.share > 1 else 2)
    x, x_scale = random_tokens(m, m, k)
    [weight], [of_weight] = several_weights((n,), k, biased=(0,))
    arguments, expected = (
        (x, x_scale, [weight.tiles], [weight.tensor_scale], [weight.bias]),
        product(x, x_scale, *of_weight),
    )
    rng = np.random.default_rng(m)
    residual = jnp.asarray(rng.normal(size=expected.shape) * np.abs(expected).max() / 4, BF16)
    settings = {"sizes": (n,), "group_size": 128, "scale_dtype": E4M3}
    if isinstance(how, Tiling):
        with emulated(*MATMUL):
            [y] = mosaic_matmul.matmul(*arguments, residual, **settings, tiling=how)
    else:
        with emulated(*MATVEC):
            [y] = rounded_matvec(*arguments, residual, **settings, cut=how)
    total = expected + np.asarray(residual, np.float64)
    # Half a unit of bf16's eight bits of the product, and of the sum, beside the roundings of the product's sums, which
    # few tokens have in float32.
    in_float32 = 1e-6 * np.abs(expected).max()
    sums = bound_of_short_sums(x, x_scale, *of_weight[:3]) if isinstance(how, Tiling) else in_float32
    distance = np.abs(np.asarray(y, np.float64) - total)
    assert np.all(distance <= 2**-8 * (np.abs(expected) + np.abs(total)) + sums)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "slots", "positions", "cut"),
    [
        (1, 2, 2, 64, 64, [0, 63, 31], DecodeCut(1)),
        (
            1,
            9,
            3,
            64,
            200,
            [199, 128],
            DecodeCut(1, 8, 3),
        ),  # a query group of three, slots that are no multiple of a tile
        (1, 8, 1, 128, 320, [300], DecodeCut(3, depth=4)),  # splits of which one has less to do
        (1, 4, 1, 128, 512, [5], DecodeCut(4)),  # and of which three have nothing
        (1, 4, 1, 128, 800, [790, 131], DecodeCut(1)),  # tiles in slots that had others before
        (1, 3, 1, 64, 1600, [1599], DecodeCut(2, depth=3)),
        (1, 2, 1, 64, 2304, [2300], DecodeCut(18)),  # more splits than are merged at once, by a second kernel
        # A cluster's blocks merge a row each, or none; or two or three.
        (1, 5, 1, 128, 1024, [1023, 40], DecodeCut(8, clustered=True)),
        (2, 12, 2, 64, 704, [[690, 691]], DecodeCut(5, 8, clustered=True)),
        (2, 16, 2, 128, 160, [[150, 151]], DecodeCut(2, 8)),  # two tokens: sixteen rows
        (3, 4, 4, 64, 256, [[0, 1, 2], [253, 254, 255]], None),
    ],
)
def test_decode_attention(tokens, heads, kv_heads, head_dim, slots, positions, cut):
    check_decode_attention(tokens, heads, kv_heads, head_dim, slots, positions, cut)


@st.composite
def any_decoding(draw):
    """What :func:`check_decode_attention` takes: any cut, and positions around its boundaries or elsewhere."""
    tokens, kv_heads, slots = draw(st.integers(1, 2)), draw(st.integers(1, 3)), 8 * draw(st.integers(1, 60))
    group, head_dim = draw(st.integers(1, 8)), draw(st.sampled_from([64, 128]))
    splits = draw(st.integers(1, 4))
    clustered = splits > 1 and draw(st.booleans())
    cut = DecodeCut(splits, draw(st.sampled_from([4, 8])), draw(st.integers(2, 4)), clustered, draw(st.integers(3, 4)))
    positions = []
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, slots - tokens))
        positions.append([first + i for i in range(tokens)])
    return tokens, kv_heads * group, kv_heads, head_dim, slots, positions, cut


@given(any_decoding())
@settings(max_examples=12)
def test_decode_attention_of_any_shape(case):
    check_decode_attention(*case)


def check_decode_attention(tokens, heads, kv_heads, head_dim, slots, positions, cut):
    positions = jnp.asarray(positions, jnp.int32).reshape(-1, tokens)
    batch, rng = len(positions), np.random.default_rng(slots)
    q8, q_scale = pk.quantize_fp8(jnp.asarray(rng.normal(size=(batch, tokens, heads, head_dim)) * 3, jnp.float32))
    cache = []
    for spread in (2.0, 0.3):
        codes, scales = pk.quantize_kv(
            jnp.asarray(rng.normal(size=(batch, kv_heads, slots, head_dim)) * spread, jnp.float32)
        )
        cache += [codes, scales]
    arguments = (q8, q_scale, *cache, positions)
    # What stands behind the last token was never written, or by a longer sequence before.
    behind = jnp.arange(slots) > positions.max(1)[:, None, None]
    unwritten = [jnp.where(behind, jnp.nan, part) if part.ndim == 3 else part for part in cache]
    with emulated(mosaic_decode, decode_steps, merge_steps, row_steps, warp_slots, matmul_steps):
        actual = mosaic_decode.decode_attention(
            q8, q_scale, *unwritten, positions, softmax_scale=head_dim**-0.5, out_dtype=jnp.float32, cut=cut
        )
    expected = pk.decode_attention(
        *arguments, softmax_scale=head_dim**-0.5, out_dtype=jnp.float32, implementation="reference"
    )
    # Both round exp(score - max) · v_scale to bf16, the reference with the maximum of all slots, the kernel with that
    # of the slots so far: 2^-9 of each term, which average out.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2**-8 * np.abs(expected).max())
    assert frobenius(actual, np.asarray(expected, np.float64)) < 3e-3


def test_a_missing_barrier_is_a_race(monkeypatch):
    """The emulator sees what it is there for."""
    monkeypatch.setattr(Block, "barrier", lambda self: None)
    values, scales = random_weight(0, 64, 256, 128, E4M3)
    tiles = pk.to_tiles(pk.pack_int4(jnp.asarray(values)), scales)
    with (
        emulated(*MATVEC),
        pytest.raises(RaceError, match="another warp"),
    ):
        rounded_matvec(
            *random_tokens(1, 2, 256), [tiles], [jnp.float32(1)], [None], sizes=(64,), group_size=128, scale_dtype=E4M3
        )

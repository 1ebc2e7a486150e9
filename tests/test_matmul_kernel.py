"""The tiled weight layout everywhere, the Hopper kernel's lowering on the CPU, and its numbers on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import (
    BF16,
    E4M3,
    folded,
    frobenius,
    matmul,
    matvec,
    mean_of_short_sums,
    on_hopper,
    product,
    random_tokens,
    random_weight,
    several_weights,
)

import pallas_kernels as pk
from pallas_kernels import mosaic_matmul, mosaic_matvec, rules, weight_layout
from pallas_kernels.tiling import Streaming, Tiling

SCALE_TYPES = [E4M3, BF16]


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 9), st.sampled_from([32, 64, 128]), st.sampled_from(SCALE_TYPES))


@settings(max_examples=15, deadline=None)  # every new shape compiles
@given(SHAPES, st.integers(0, 99))
def test_tiles_give_back_codes_and_scales(shape, seed):
    tiles_n, groups, group_size, scale_dtype = shape
    n, k = 64 * tiles_n, groups * group_size
    values, scales = random_weight(seed, n, k, group_size, scale_dtype)
    codes = pk.pack_int4(jnp.asarray(values))
    tiles = pk.to_tiles(codes, scales)
    assert tiles.shape == weight_layout.tiles_shape(n, k, group_size, scale_dtype)
    back, scales_back = pk.from_tiles(tiles, n, k, group_size, scale_dtype)
    np.testing.assert_array_equal(back, codes)
    np.testing.assert_array_equal(np.asarray(scales_back).view(np.uint8), np.asarray(scales).view(np.uint8))


def test_tiles_are_laid_out_as_documented():
    n, k, group_size = 192, 384, 64
    values, scales = random_weight(0, n, k, group_size, E4M3)
    tiles = np.asarray(pk.to_tiles(pk.pack_int4(jnp.asarray(values)), scales)).view(np.uint32)
    tiles = tiles.reshape(3, 3, 4, -1)
    rng = np.random.default_rng(1)
    for _ in range(200):
        row, column = rng.integers(n), rng.integers(k)
        in_row, in_column = row % 64, column % 128
        w, o, r = in_row // 16, in_row // 8 % 2, in_row % 8
        b, h, q, byte = in_column // 32, in_column // 16 % 2, in_column // 4 % 4, in_column % 4
        lane, register = 4 * r + q, 4 * b + 2 * h + o
        u = register // 2
        share = tiles[row // 64, column // 128, w]
        word = int(share[u // 4 * 128 + lane * 4 + u % 4])
        if register % 2:
            sign = word >> (8 * ((byte + 1) % 4) + 3) & 1
            magnitude = word >> (8 * byte + 4) & 7
        else:
            sign, magnitude = word >> (8 * byte + 7) & 1, word >> 8 * byte & 7
        assert (-1 - magnitude if sign else magnitude) == values[row, column]
        share_scales = share[weight_layout.CODE_WORDS :].view(E4M3)
        at = in_column // group_size * 16 + r * 2 + o
        assert float(share_scales[at]) == float(scales[row, column // group_size])


@pytest.mark.parametrize("scale_dtype", SCALE_TYPES)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_reference_of_tiles(group_size, scale_dtype):
    m, n, k = 5, 128, 384
    values, scales = random_weight(2, n, k, group_size, scale_dtype)
    x, x_scale = random_tokens(3, m, k)
    bias = jnp.asarray(np.random.default_rng(4).normal(size=n) * 1000, jnp.float32)
    y = pk.int4_fp8_matmul_tiled(
        x, x_scale, pk.to_tiles(pk.pack_int4(jnp.asarray(values)), scales), jnp.float32(0.25), bias,
        n=n, group_size=group_size, scale_dtype=scale_dtype, out_dtype=jnp.float32, implementation="reference",
    )  # fmt: skip
    # Float32 sums of 384 terms.
    assert frobenius(y, product(x, x_scale, values, scales, 0.25, bias)) < 1e-6


def call(m=4, n=128, k=256, **changes):
    values, scales = random_weight(0, n, k, 128, E4M3)
    arguments = {
        "x8": jnp.zeros((m, k), E4M3), "x_scale": jnp.ones(m), "tensor_scale": jnp.float32(1),
        "tiles": pk.to_tiles(pk.pack_int4(jnp.asarray(values)), scales), "n": n, "group_size": 128, "scale_dtype": E4M3,
    }  # fmt: skip
    return pk.int4_fp8_matmul_tiled(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 48}, "group_size=48"),
        ({"group_size": 32}, "tiles must have shape"),
        ({"scale_dtype": BF16}, "tiles must have shape"),
        ({"scale_dtype": jnp.float32}, "scale_dtype must be"),
        ({"x_scale": jnp.ones(3)}, "x_scale must have shape"),
        ({"x8": jnp.zeros((4, 256), BF16)}, "x8 must be float8_e4m3fn"),
        ({"bias": jnp.ones(3)}, "bias must have shape"),
    ],
)
def test_refuses_what_does_not_belong_together(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


def test_named_kernel_is_refused_where_it_cannot_run():
    with pytest.raises(NotImplementedError, match="no multiple of 64"):
        call(n=96, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="out_dtype=float16"):
        call(out_dtype=jnp.float16, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="no 'triton' implementation"):
        call(implementation="triton")
    with pytest.raises(NotImplementedError, match="17 tokens are more than 16|no Hopper GPU"):
        call(m=17, implementation="mosaic_gpu_matvec")
    assert call(n=96).shape == (4, 96)
    if not pk.has_hopper_gpu():
        with pytest.raises(NotImplementedError, match="no Hopper GPU"):
            call(implementation="mosaic_gpu")


@pytest.mark.parametrize(("m", "k"), [(17, 4096), (9, 256)])
def test_more_tokens_are_not_for_the_kernel_of_few(m, k):
    assert rules.streaming_by_rule(m, 4096, k, 1040) is None
    with pytest.raises(NotImplementedError, match=f"{m} tokens by 128 outputs by {k} inputs"):
        mosaic_matvec.matvec(
            pk.Rounded(jnp.zeros((m, k), E4M3), jnp.ones(m)), [jnp.zeros((2, k // 128, 5, 208), jnp.int32)],
            [jnp.float32(1)], [None], sizes=(128,), group_size=128, scale_dtype=E4M3,
        )  # fmt: skip


LOWERED = [
    (1, 192, 576, 64, BF16),
    (16, 4096, 14336, 128, E4M3),
    (64, 28672, 4096, 128, E4M3),
    (100, 1536, 576, 32, BF16),
    (256, 4096, 4096, 128, E4M3),
    (4097, 6144, 4096, 128, BF16),
    (1000, 6144, 4096, 128, E4M3),  # tiles of 192 outputs
    (512, 6144, 4096, 64, E4M3),
    (512, 6144, 4096, 128, BF16),
    (1300, 4096, 2048, 128, E4M3),  # tiles that two blocks divide, behind whole ones
    (1000, 64, 128, 128, E4M3),
    (16, 2048, 8192, 128, E4M3),  # blocks that take equally many steps
]


FEW = [
    (1, 64, 32, 32, E4M3),
    (1, 192, 576, 64, BF16),
    (1, 28672, 4096, 128, E4M3),
    (3, 640, 2816, 64, E4M3),
    (8, 4096, 4096, 128, BF16),
    (4, 6144, 4096, 128, E4M3),
    (8, 1024, 28672, 128, E4M3),  # inputs that do not fit into shared memory
    (7, 1536, 576, 32, BF16),
    (6, 5120, 13824, 128, E4M3),
]


KERNELS = [(matmul, shape) for shape in LOWERED] + [(matvec, shape) for shape in FEW]


@pytest.mark.parametrize(("multiply", "sizes"), KERNELS)
def test_lowers_for_cuda_without_a_gpu(multiply, sizes):
    m, n, k, group_size, scale_dtype = sizes
    shape = jax.ShapeDtypeStruct
    tiles = shape(weight_layout.tiles_shape(n, k, group_size, scale_dtype), jnp.int32)
    kernel = functools.partial(multiply, n=n, group_size=group_size, scale_dtype=scale_dtype)
    arguments = (shape((m, k), E4M3), shape((m,), jnp.float32), tiles, shape((), jnp.float32), shape((n,), BF16))
    lowered = jax.jit(kernel).trace(*arguments).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


GPU_SHAPES = [
    (1, 64, 32, 32, E4M3),
    (7, 320, 1152, 64, E4M3),
    (33, 576, 1536, 128, E4M3),
    (129, 640, 2816, 128, BF16),
    (300, 640, 1152, 64, BF16),
    (513, 1088, 4224, 128, E4M3),
    (2048, 4096, 11008, 128, E4M3),
    (1024, 4096, 14336, 128, E4M3),
]
ON_GPU = [*KERNELS, *((matmul, shape) for shape in GPU_SHAPES)]


def on_gpu(multiply, m, n, k, group_size, scale_dtype, bias=True, repeats=1, **how):
    """Kernel results of equal calls, and the float32 product of the same inputs."""
    values, scales = random_weight(m, n, k, group_size, scale_dtype)
    x, x_scale = random_tokens(m + 1, m, k)
    tiles = pk.to_tiles(pk.pack_int4(jnp.asarray(values)), scales)
    offsets = jnp.asarray(np.random.default_rng(5).normal(size=n) * 100, jnp.float32) if bias else None
    kernel = jax.jit(functools.partial(multiply, n=n, group_size=group_size, scale_dtype=scale_dtype, **how))
    results = [kernel(x, x_scale, tiles, jnp.float32(0.5), offsets) for _ in range(repeats)]
    if how.get("numerics") == "folded":
        values, scales = folded(values, scales)
    w = (values.reshape(*scales.shape, -1) * np.asarray(scales, np.float32)[..., None]).reshape(n, k)
    expected = jnp.matmul(x.astype(jnp.float32), jnp.asarray(w).T, precision="highest") * x_scale[:, None] * 0.5
    return results, np.asarray(expected if offsets is None else expected + offsets, np.float64)


# The result is rounded to bf16 (1.7e-3 of the Frobenius norm). Sums in float16 add up to 2.2e-3 to that (112 groups of
# 128), and so do the tensor core's accumulators of about 14 bits, which hold those of bf16 scales.
TOLERANCE = 4e-3


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("multiply", "sizes"), ON_GPU)
def test_kernel_against_float32(multiply, sizes):
    results, expected = on_gpu(multiply, *sizes, repeats=20)
    assert results[0].shape == sizes[:2]
    assert results[0].dtype == BF16
    assert frobenius(results[0], expected) < TOLERANCE
    for other in results[1:]:
        np.testing.assert_array_equal(np.asarray(other).view(np.uint16), np.asarray(results[0]).view(np.uint16))


@pytest.mark.gpu
@on_hopper
def test_flags_of_rounded_rows_serve_several_products():
    m, n, k = 16, 2048, 8192
    assert rules.tiling_by_rule(m, n, k, 4 * weight_layout.share_bytes(128, E4M3)).stream_k
    weights, dense = several_weights((n, n), k, ())
    rows = jnp.asarray(np.random.default_rng(3).normal(size=(m, k)), BF16)

    @jax.jit
    def multiply(rows):
        rounded = pk.round_rows(pk.Unrounded(rows), implementation="mosaic_gpu")
        settings = {"group_size": 128, "scale_dtype": E4M3, "implementation": "mosaic_gpu"}
        return rounded, [pk.int4_matmuls_tiled(rounded, [weight], **settings)[0] for weight in weights]

    rounded, results = multiply(rows)
    assert not np.any(rounded.flags)
    for y, its in zip(results, dense, strict=True):
        assert frobenius(y, product(rounded.values, rounded.scale, *its)) < TOLERANCE


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    "how",
    [
        Tiling(8, 3, halves=1, unroll=2, split=4, persistent=False),
        Tiling(32, 4, halves=2, unroll=3),
        Tiling(64, 4, halves=2, split=2, persistent=False),
        Tiling(128, 4, halves=1, unroll=2),
        Tiling(256, 2, share=2, snake=1),
        Tiling(128, 6, share=2),  # all tiles are divided
        Tiling(16, 4, share=2, halves=1, unroll=2),  # some are
        Tiling(256, 4, unroll=5),
        Tiling(16, 4, halves=1, unroll=2, persistent=False, teams=2),
        Tiling(64, 6, halves=1, unroll=2, split=2, persistent=False, teams=2),
        Tiling(32, 6, halves=2, unroll=3, split=4, persistent=False, teams=2),
        Tiling(16, 8, halves=1, unroll=2, split=2, persistent=False, teams=2, sides=1),
        Tiling(64, 8, halves=1, unroll=2, persistent=False, teams=4, sides=1),
        Tiling(64, 12, halves=1, unroll=2, split=2, persistent=False, teams=2, sides=1),
        Tiling(8, 8, halves=1, unroll=2, persistent=False, teams=2, sides=1),
        Tiling(16, 8, halves=1, unroll=2, stream_k=True),
        Tiling(64, 8, halves=1, unroll=2, stream_k=True),
        Tiling(128, 4, stream_k=True),
        Tiling(256, 3, stream_k=True),
        Tiling(128, 4, halves=1, sides=4),
        Tiling(96, 4, halves=1, sides=4, unroll=2),
        Tiling(128, 6, halves=1, unroll=2, sides=3),
        Tiling(192, 4, halves=1, unroll=2, sides=3, share=2),  # all tiles are divided
        Tiling(16, 6, halves=1, unroll=4, sides=3, share=2),  # some are
        Tiling(128, 6, halves=1, unroll=2, split=2, persistent=False, sides=3),
        Tiling(96, 8, persistent=False),
        Tiling(128, 8, halves=1, unroll=2, split=2, persistent=False),
        Tiling(256, 4, split=2, persistent=False),
        Tiling(224, 4, split=2, persistent=False),
        Tiling(96, 12, halves=1, unroll=2, persistent=False, teams=2, sides=1),
        Tiling(128, 10, halves=1, unroll=2, split=2, persistent=False, teams=2, sides=1),
        Tiling(128, 4, halves=1, unroll=2, split=2, persistent=False, sides=4),
        Tiling(160, 6, share=2),
        Tiling(192, 4, persistent=False),
        Tiling(224, 4, stream_k=True),
    ],
    ids=str,
)
def test_tilings_agree_with_float32(how):
    results, expected = on_gpu(matmul, 300, 1088, 1664, 128, E4M3, bias=False, repeats=3, tiling=how)
    assert frobenius(results[0], expected) < TOLERANCE
    np.testing.assert_array_equal(np.asarray(results[0]).view(np.uint16), np.asarray(results[2]).view(np.uint16))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    "shape", [(1, 192, 576, 64, BF16), (40, 640, 2816, 128, E4M3), (513, 1088, 4224, 32, E4M3)], ids=str
)
def test_folded_against_float32(shape):
    results, expected = on_gpu(matmul, *shape, repeats=3, numerics="folded")
    assert frobenius(results[0], expected) < TOLERANCE
    np.testing.assert_array_equal(np.asarray(results[0]).view(np.uint16), np.asarray(results[2]).view(np.uint16))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("cut", [(1, 16, 1, True), (2, 8, 2, False), (3, 4, 4, True), (4, 16, 2, False)], ids=str)
@pytest.mark.parametrize("m", [2, 16])
def test_streamings_agree_with_float32(m, cut):
    """70 tiles along k: parts of 16 or 32 tiles, of which the last is not full."""
    results, expected = on_gpu(matvec, m, 8640, 8960, 64, E4M3, bias=False, repeats=3, cut=Streaming(*cut))
    assert frobenius(results[0], expected) < TOLERANCE
    np.testing.assert_array_equal(np.asarray(results[0]).view(np.uint16), np.asarray(results[2]).view(np.uint16))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("share", [1, 2])
def test_blocks_with_outputs_of_two_weights(share):
    m, k, sizes = 300, 1024, (576, 192, 64, 320)
    x, x_scale = random_tokens(m + 1, m, k)
    weights, dense = several_weights(sizes, k, biased=(1, 3))
    tiles, tensor_scales, biases, _ = zip(*weights, strict=True)
    results = mosaic_matmul.matmul(
        x, x_scale, tiles, tensor_scales, biases, sizes=sizes, group_size=128, scale_dtype=E4M3,
        tiling=Tiling(128, 6, halves=1, unroll=2, sides=3, share=share),
    )  # fmt: skip
    for y, of_weight in zip(results, dense, strict=True):
        assert frobenius(y, product(x, x_scale, *of_weight)) < TOLERANCE


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("m", [1, 4, 16, 40, 300, 1000])
@pytest.mark.parametrize("sizes", [(4096, 1024, 1024), (14336, 14336), (576, 192, 192)], ids=str)
def test_several_weights_agree_with_float32(m, sizes):
    """q, k and v, or gate and up, in either kernel."""
    k = 1024
    x, x_scale = random_tokens(m + 1, m, k)
    weights, dense = several_weights(sizes, k, biased=range(1, len(sizes)))
    expected = [product(x, x_scale, *of_weight) for of_weight in dense]
    results = pk.int4_fp8_matmuls_tiled(x, x_scale, weights, group_size=128, scale_dtype=E4M3)
    for y, exact in zip(results, expected, strict=True):
        assert frobenius(y, exact) < TOLERANCE
    results = pk.int4_fp8_matmuls_tiled(
        x, x_scale, weights, group_size=128, scale_dtype=E4M3, out_dtype=jnp.float32
    )  # fmt: skip
    tolerance = 1e-6 if m <= 4 else mean_of_short_sums(k, 128)  # float32 sums of few tokens
    for y, exact in zip(results, expected, strict=True):
        assert y.dtype == jnp.float32
        assert frobenius(y, exact) < tolerance


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (2, 4096, 4096),
        (16, 4096, 14336),
        (64, 576, 1536),
        (200, 4096, 4096),
        (1000, 1088, 2048),
        (4097, 4096, 4096),
        (1000, 6144, 4096),
    ],
)
def test_residual_on_a_gpu(m, n, k):
    values, scales = random_weight(m, n, k, 128, E4M3)
    x, x_scale = random_tokens(m + 1, m, k)
    weight = pk.TiledWeight(pk.to_tiles(pk.pack_int4(jnp.asarray(values)), scales), jnp.float32(0.5), None, n)
    w = jnp.asarray(values * np.asarray(scales, np.float32).repeat(128, axis=1))
    expected = jnp.matmul(x.astype(jnp.float32), w.T, precision="highest") * x_scale[:, None] * 0.5
    residual = (jax.random.normal(jax.random.key(m), (m, n)) * jnp.std(expected)).astype(BF16)
    settings = {"group_size": 128, "scale_dtype": E4M3}
    results = [pk.int4_fp8_matmuls_tiled(x, x_scale, [weight], residual, **settings)[0] for _ in range(20)]
    assert frobenius(results[0], np.asarray(expected + residual, np.float64)) < TOLERANCE
    for other in results[1:]:
        np.testing.assert_array_equal(np.asarray(other).view(np.uint16), np.asarray(results[0]).view(np.uint16))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("multiply", "m", "n"), [(matmul, 200, 1024), (matmul, 1000, 6144), (matvec, 5, 1024)])
def test_thousand_launches_give_the_same(multiply, m, n):
    k = 2048
    values, scales = random_weight(0, n, k, 128, E4M3)
    x, x_scale = random_tokens(1, m, k)
    tiles = pk.to_tiles(pk.pack_int4(jnp.asarray(values)), scales)

    @jax.jit
    def differences(tiles):
        def once():
            return multiply(
                jax.lax.optimization_barrier(x), x_scale, tiles, jnp.float32(1), n=n, group_size=128, scale_dtype=E4M3
            )

        first = once()
        return jax.lax.fori_loop(0, 1000, lambda _, count: count + jnp.sum(once() != first), 0)

    assert int(differences(tiles)) == 0

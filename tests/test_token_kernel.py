"""One token's product with its rounding in the kernel: emulated, lowered for CUDA, on a GPU; and in parts anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated_gpu import emulated
from kernel_oracles import BF16, E4M3, frobenius, on_hopper, product, several_weights
from test_row_kernels import exact, norm, silu

import pallas_kernels as pk
from pallas_kernels import (
    dispatch,
    matmul_steps,
    matvec_steps,
    mosaic_matvec,
    row_steps,
    token_steps,
    warp_slots,
    weight_layout,
    weight_steps,
)

KERNEL = mosaic_matvec, matvec_steps, warp_slots, matmul_steps, weight_steps, token_steps, row_steps


def source_of(kind, k, seed=0, m=1):
    """A source, and the float64 activations that it stands for."""
    rng = np.random.default_rng(seed)
    a, b = (jnp.asarray(rng.standard_t(4, size=(m, k)), BF16) for _ in range(2))
    gain = jnp.asarray(rng.normal(size=k), jnp.float32 if kind == "norm in float32" else BF16)
    if kind == "rows":
        return pk.Unrounded(a), exact(a)
    if kind == "gate":
        return pk.Ungated(a, b), silu(exact(a)) * exact(b)
    normed = norm(exact(a), exact(gain))
    return pk.Unnormed(a, gain, 1e-5), exact(jnp.asarray(normed, BF16))


# The result is rounded to bf16 (1.7e-3 of the Frobenius norm). Activations that differ in their last bits from the
# float64 ones may fall to the other side of their rounding to e4m3, one in some thousands, by a sixteenth.
TOLERANCE = 4e-3
# The reference rounds silu and its product with up to bf16 first: a few in a hundred fall to another side.
TOLERANCE_IN_PARTS = 1e-2


def check(multiply, kind, sizes, k, biased=(), with_residual=False, m=1, tolerance=TOLERANCE):
    source, activations = source_of(kind, k, m=m)
    group_size = 128 if k % 128 == 0 else 64
    weights, dense = several_weights(sizes, k, biased, group_size)
    # By numpy, whose quotients are exact to the last bit: XLA's on a GPU are not, and many lie between two of e4m3.
    exact_rows = activations.astype(np.float32)
    x_scale = np.abs(exact_rows).max(1) / np.float32(448)
    x8 = (exact_rows / x_scale[:, None]).astype(E4M3)
    residual = None
    if with_residual:
        # As large as the product, so that either one missing is seen.
        residual = jnp.asarray(np.random.default_rng(9).normal(size=(m, sizes[0])) * 1000, BF16)
    settings = {"group_size": group_size, "scale_dtype": E4M3}
    for y, of_weight in zip(multiply(source, weights, residual, **settings), dense, strict=True):
        expected = product(x8, x_scale, *of_weight)
        assert y.dtype == BF16
        assert y.shape == expected.shape
        assert frobenius(y, expected + (exact(residual) if with_residual else 0)) < tolerance


CASES = [
    ("rows", (64,), 64, (), False),
    ("rows", (192,), 2368, (0,), True),
    ("norm", (192, 64, 64), 640, (1,), False),
    ("norm in float32", (2112, 64), 256, (), False),  # two units for some blocks
    ("gate", (64,), 1408, (), True),
]


def alone(source, weights, residual, **settings):
    tiles, tensor_scales, biases, sizes = zip(*weights, strict=True)
    return mosaic_matvec.matvec(source, tiles, tensor_scales, biases, residual, sizes=sizes, **settings)


FEW_TOKENS = [
    (2, ("rows", (192,), 2368, (0,), True)),
    (3, ("norm", (192, 64, 64), 640, (1,), False)),
    (4, ("norm in float32", (2112, 64), 256, (), False)),
]


@pytest.mark.parametrize(("m", "case"), [*((1, case) for case in CASES), *FEW_TOKENS])
def test_on_the_emulated_multiprocessor(m, case):
    with emulated(*KERNEL):
        check(alone, *case, m=m)


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_in_parts(case, m):
    check(pk.int4_matmuls_tiled, *case, m=m, tolerance=TOLERANCE_IN_PARTS if case[0] == "gate" else TOLERANCE)


def test_a_zero_token_gives_the_bias():
    weights, dense = several_weights((64,), 128, (0,))
    with emulated(*KERNEL):
        [y] = alone(pk.Unrounded(jnp.zeros((1, 128), BF16)), weights, None, group_size=128, scale_dtype=E4M3)
    np.testing.assert_array_equal(np.asarray(y[0]), np.asarray(dense[0][-1].astype(BF16)))


def test_refuses_what_does_not_belong_together():
    weights, _ = several_weights((64, 64), 128, ())
    source, settings = pk.Unrounded(jnp.zeros((1, 128), BF16)), {"group_size": 128, "scale_dtype": E4M3}
    with pytest.raises(ValueError, match="a residual goes with one weight, got 2"):
        pk.int4_matmuls_tiled(source, weights, jnp.zeros((1, 64), BF16), **settings)
    with pytest.raises(ValueError, match=r"residual must have shape \(1, 64\)"):
        pk.int4_matmuls_tiled(source, weights[:1], jnp.zeros((64,), BF16), **settings)
    with pytest.raises(NotImplementedError, match="no 'triton' implementation"):
        pk.int4_matmuls_tiled(source, weights, implementation="triton", **settings)
    if not pk.has_hopper_gpu():
        with pytest.raises(NotImplementedError, match="no Hopper GPU"):
            pk.int4_matmuls_tiled(source, weights, implementation="mosaic_gpu_matvec", **settings)


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (pk.Unnormed(jnp.zeros((1, 128), BF16), jnp.ones(128, jnp.float16), 1e-5), "gain must be bfloat16 or float32"),
        (pk.Unnormed(jnp.zeros((1, 128), BF16), jnp.ones(64, BF16), 1e-5), r"gain must have shape \(128,\)"),
        (pk.Ungated(jnp.zeros((1, 128), BF16), jnp.zeros((1, 64), BF16)), "the rows must be matrices of one shape"),
        (pk.Unrounded(jnp.zeros(128, BF16)), "the rows must be matrices"),
    ],
)
def test_refuses_sources_that_make_no_sense(monkeypatch, source, message, on_gpu):
    """Before a kernel is chosen, also where there is one."""
    weights, _ = several_weights((64,), 128, ())
    monkeypatch.setattr(dispatch, "has_hopper_gpu", lambda: on_gpu)
    with pytest.raises(ValueError, match=message):
        pk.int4_matmuls_tiled(source, weights, group_size=128, scale_dtype=E4M3)
    right = pk.Unrounded(jnp.zeros((1, 128), BF16))
    with pytest.raises(ValueError, match="tiles must have shape"):
        pk.int4_matmuls_tiled(right, [weights[0]._replace(outputs=128)], group_size=128, scale_dtype=E4M3)
    with pytest.raises(ValueError, match="group_size=48"):
        pk.int4_matmuls_tiled(right, weights, group_size=48, scale_dtype=E4M3)


LARGE = [
    ("norm", (4096, 1024, 1024), 4096, (), False),
    ("rows", (4096,), 4096, (), True),
    ("norm in float32", (14336, 14336), 4096, (0, 1), False),
    ("gate", (4096,), 14336, (), True),
    ("gate", (5120,), 13824, (0,), True),
    ("gate", (576,), 1536, (), True),
]


LARGE_OF_FEW = [
    (2, ("norm", (4096, 1024, 1024), 4096, (), False)),
    (4, ("norm in float32", (13824, 13824), 5120, (0, 1), False)),
    (3, ("rows", (4096,), 4096, (), True)),
]


@pytest.mark.parametrize(("m", "case"), [*((1, case) for case in LARGE), *LARGE_OF_FEW])
def test_lowers_for_cuda_without_a_gpu(m, case):
    kind, sizes, k, biased, with_residual = case
    shape = jax.ShapeDtypeStruct
    source = jax.tree.map(lambda x: shape(x.shape, x.dtype), source_of(kind, k, m=m)[0])
    biases = [shape((n,), jnp.float32) if i in biased else None for i, n in enumerate(sizes)]
    weights = [
        pk.TiledWeight(shape(weight_layout.tiles_shape(n, k, 128, E4M3), jnp.int32), shape((), jnp.float32), bias, n)
        for n, bias in zip(sizes, biases, strict=True)
    ]
    residual = shape((m, sizes[0]), BF16) if with_residual else None

    def multiply(source, tiles, tensor_scales, biases, residual):
        return mosaic_matvec.matvec(
            source, tiles, tensor_scales, biases, residual, sizes=sizes, group_size=128, scale_dtype=E4M3
        )

    arguments = (source, [w.tiles for w in weights], [w.tensor_scale for w in weights], biases, residual)
    assert "mosaic_gpu" in jax.jit(multiply).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("m", "case"), [*((1, case) for case in (*CASES, *LARGE)), *FEW_TOKENS, *LARGE_OF_FEW])
def test_on_a_gpu(m, case):
    kernel, calls = pk.int4_matmuls_tiled, []

    def repeated(*arguments, **settings):
        calls.extend(kernel(*arguments, implementation="mosaic_gpu_matvec", **settings) for _ in range(20))
        return calls[0]

    check(repeated, *case, m=m)
    for other in calls[1:]:
        for y, first in zip(other, calls[0], strict=True):
            np.testing.assert_array_equal(np.asarray(y).view(np.uint16), np.asarray(first).view(np.uint16))

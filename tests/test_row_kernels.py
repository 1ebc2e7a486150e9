"""Kernels that make e4m3 activations: against float64 on the emulated multiprocessor and on a GPU, and lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated_gpu import emulated
from kernel_oracles import BF16, on_hopper

from pallas_kernels import mosaic_rows, row_steps
from pallas_kernels.tiling import FLAGS

EPS = 1e-5


def rows(seed, m, k):
    """Rows of different magnitudes with outliers, the last one all zeros."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(3, size=(m, k)) * np.exp(rng.normal(size=(m, 1)) * 2)
    values[-1] = 0
    return jnp.asarray(values, BF16)


def exact(x):
    return np.asarray(x.astype(jnp.float32), np.float64)


def check(results, expected, rounding):
    """e4m3 values with their scales stand for ``expected``, rounded by up to ``rounding``, and flags are zeros."""
    x8, x_scale, flags = results
    np.testing.assert_array_equal(flags, np.zeros(FLAGS, np.int32))
    peak = np.abs(expected).max(axis=1)
    np.testing.assert_allclose(x_scale, np.where(peak > 0, peak / 448, 1), rtol=rounding + 1e-6)
    actual = exact(x8) * np.asarray(x_scale, np.float64)[:, None]
    # Half a step of three fraction bits, or of the subnormals' 2^-9.
    bound = np.abs(expected) * (2**-4 + rounding) + np.asarray(x_scale)[:, None] * 2**-10
    assert np.all(np.abs(actual - expected) <= bound * (1 + 1e-4))


def norm(x, gain):
    return x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + EPS) * gain


def silu(x):
    return x / (1 + np.exp(-x))


SIZES = [(3, 64), (2, 1032), (2, 4096), (1, 14336), (2, 14328), (3, 5632), (2, 11008)]


def check_all(m, k, gain_dtype):
    x, y = rows(1, m, k), rows(2, m, k)
    gain = jnp.asarray(np.random.default_rng(3).normal(size=k), gain_dtype)
    check(mosaic_rows.quantize_rows(x), exact(x), 0)
    check(mosaic_rows.gate_quantize(x, y), silu(exact(x)) * exact(y), 1e-5)
    # Rounded to bf16, as a norm's result is.
    check(mosaic_rows.norm_quantize(x, gain, eps=EPS), norm(exact(x), exact(gain)), 2**-8)


@pytest.mark.parametrize("gain_dtype", [BF16, jnp.float32])
@pytest.mark.parametrize(("m", "k"), SIZES)
def test_on_the_emulated_multiprocessor(m, k, gain_dtype, monkeypatch):
    monkeypatch.setattr(mosaic_rows, "GATE_PARTS", 1)  # clusters are not emulated
    with emulated(mosaic_rows, row_steps):
        check_all(m, k, gain_dtype)


@pytest.mark.parametrize("m", [1, 33, 200, 1000, 16384])
@pytest.mark.parametrize("k", [64, 576, 4096, 5120, 14336, 28672, 53248, 120000])
def test_a_row_has_its_threads(m, k):
    steps = mosaic_rows._steps(m, k, mosaic_rows.GATE_PARTS)
    of_thread = k / (row_steps.VECTOR * steps.threads * steps.parts)
    assert of_thread <= steps.vectors < of_thread + 1
    assert steps.vectors <= mosaic_rows.MOST_VECTORS or steps.threads == 128 * row_steps.MAX_WARPGROUPS


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("gain_dtype", [BF16, jnp.float32])
@pytest.mark.parametrize(
    ("m", "k"),
    [
        *SIZES, (16, 576), (33, 14336), (66, 5120), (1000, 4096), (2048, 11008),
        (1000, 14336), (700, 13824), (1500, 5632), (2000, 5120), (1200, 8192), (400, 28672), (150, 53248),
    ],
)  # fmt: skip
def test_on_a_gpu(m, k, gain_dtype):
    check_all(m, k, gain_dtype)


def test_a_nan_makes_its_row_nan():
    x = rows(0, 3, 128).at[1, 77].set(jnp.nan)
    with emulated(mosaic_rows, row_steps):
        x8, x_scale, _ = mosaic_rows.quantize_rows(x)
    assert np.isnan(np.asarray(x_scale)).tolist() == [False, True, False]
    assert np.isnan(exact(x8)).all(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize(("m", "k"), [(1, 64), (1, 14336), (4096, 4096), (3, 576)])
def test_lowers_for_cuda_without_a_gpu(m, k):
    x, gain = jax.ShapeDtypeStruct((m, k), BF16), jax.ShapeDtypeStruct((k,), BF16)

    def everything(x, gain):
        normed = mosaic_rows.norm_quantize(x, gain, eps=EPS)
        return normed, mosaic_rows.quantize_rows(x), mosaic_rows.gate_quantize(x, x)

    assert jax.jit(everything).trace(x, gain).lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu") >= 3

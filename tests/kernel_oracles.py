"""What tests of kernels share: random weights and activations, float64 oracles, and the matmuls as functions."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import mosaic_matmul, mosaic_matvec
from pallas_kernels.matmul_steps import sums_unit

E4M3, BF16 = jnp.float8_e4m3fn, jnp.bfloat16
# There is no kernel for other GPUs.
on_hopper = pytest.mark.skipif(not pk.has_hopper_gpu(), reason="no Hopper GPU")


def random_weight(seed, n, k, group_size, scale_dtype):
    """Codes over the whole range, a group of zeros, and signed scales down to e4m3's smallest subnormal."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-8, 8, (n, k)).astype(np.int8)
    values[rng.integers(n), :group_size] = 0
    values[rng.integers(n), -group_size:] = -8
    scales = np.exp(rng.normal(size=(n, k // group_size)) * 0.5) * rng.choice([-1, 1], (n, k // group_size))
    scales[rng.integers(n), rng.integers(k // group_size)] = 2.0**-9
    return values, jnp.asarray(scales, scale_dtype)


def random_tokens(seed, m, k):
    """e4m3 activations that reach their largest value, one token of zeros among them, and token scales."""
    rng = np.random.default_rng(seed)
    x = jnp.clip(jnp.asarray(rng.normal(size=(m, k)) * 100), -448, 448).astype(E4M3)
    if m > 1:
        x = x.at[m // 2].set(0)
    return x, jnp.asarray(rng.uniform(0.5, 2, m), jnp.float32)


def product(x, x_scale, values, scales, tensor_scale, bias=None):
    """The float64 oracle."""
    w = values.reshape(*scales.shape, -1) * np.asarray(scales, np.float64)[..., None]
    y = np.asarray(x, np.float64) @ w.reshape(values.shape).T * np.asarray(x_scale, np.float64)[:, None] * tensor_scale
    return y if bias is None else y + np.asarray(bias, np.float64)


def frobenius(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


def roundings_of_short_sums(k, group_size):
    """Of a sum that the matmul keeps in float16: a group's by each tensor core instruction, the whole by each group."""
    return k // group_size + group_size // 32


def bound_of_short_sums(x, x_scale, values, scales, tensor_scale):
    """What these roundings can do at most: each moves a number by 2^-11 of it, and none is larger than all terms.

    Or, of subnormal numbers, by 2^-25 of the unit of the sums, or of products times the largest scale.
    """
    k, groups = values.shape[1], scales.shape[1]
    terms = product(np.abs(np.asarray(x, np.float64)), x_scale, np.abs(values), np.abs(scales), tensor_scale)
    unit = max(sums_unit(k), np.abs(np.asarray(scales, np.float64)).max() * groups) * 2.0**9
    of_unit = 2.0**-25 * unit * np.asarray(x_scale, np.float64)[:, None] * tensor_scale
    return roundings_of_short_sums(k, k // groups) * (2.0**-11 * terms + of_unit)


def mean_of_short_sums(k, group_size):
    """What they do in the root mean square, relative to the sums: 2e-4 each, independently."""
    return 2e-4 * roundings_of_short_sums(k, group_size) ** 0.5


def several_weights(sizes, k, biased, group_size=128):
    """Weights of different tensor scales, and what the oracle takes of each behind the activations."""
    weights, dense = [], []
    for i, n in enumerate(sizes):
        values, scales = random_weight(i, n, k, group_size, E4M3)
        tiles = pk.to_tiles(pk.pack_int4(jnp.asarray(values)), scales)
        bias = jnp.asarray(np.random.default_rng(i).normal(size=n) * 100, jnp.float32) if i in biased else None
        weights.append(pk.TiledWeight(tiles, jnp.float32(2**i), bias, n))
        dense.append((values, scales, 2.0**i, bias))
    return weights, dense


def folded(values, scales):
    """Weights rounded to e4m3 with their scales, and what is left of these."""
    scaled = values.reshape(*scales.shape, -1) * np.asarray(scales, np.float32)[..., None]
    return np.clip(scaled, -448, 448).astype(E4M3).astype(np.float32).reshape(values.shape), np.ones_like(scales)


def rounded_matvec(x, x_scale, *arguments, **settings):
    return mosaic_matvec.matvec(pk.Rounded(x, x_scale), *arguments, **settings)


def of_one_weight(kernel):
    def multiply(x, x_scale, tiles, tensor_scale, bias=None, *, n, **how):
        return kernel(x, x_scale, [tiles], [tensor_scale], [bias], sizes=(n,), **how)[0]

    return multiply


matmul, matvec = of_one_weight(mosaic_matmul.matmul), of_one_weight(rounded_matvec)

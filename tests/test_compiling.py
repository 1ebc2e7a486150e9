"""Functions compiled without a search for fast products: alone, and where jax.jit refuses compiler options."""

from functools import partial

import jax
import numpy as np

from fireq_jax.compiling import jit_untuned


@partial(jit_untuned, static_argnums=1, donate_argnums=0)
def power(x, n):
    return x @ x * n


def test_alone_and_within_other_transformations():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 5)).astype(np.float32)
    expected = 3 * (x @ x)
    # Products of five float32 numbers near 1: some units in the last place.
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(power(jax.numpy.asarray(x), 3), expected)
    close(jax.jit(lambda x: power(x, 3))(x), expected)
    close(jax.vmap(lambda x: power(x, 3))(x[None])[0], expected)
    # d(sum(x x)) / dx_ij = sum of row j + sum of column i
    close(jax.grad(lambda x: power(x, 3).sum())(x), 3 * (x.sum(1)[None, :] + x.sum(0)[:, None]))


def test_static_and_donated_arguments_are_passed_on():
    x = jax.numpy.ones((4, 4))
    assert float(power(x, 2)[0, 0]) == 8.0
    assert x.is_deleted()

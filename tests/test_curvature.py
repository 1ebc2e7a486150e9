"""The loss's curvature against gradients of the model itself, and rounding across outputs against least squares."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_calibrated import correlated, gptq_oracle

import fireq_jax
from fireq_jax import curvature, layers
from fireq_jax.quantize import layer_names
from fireq_jax.rounding import OUTPUT_PARTS, damped, gptq, gptq_across_outputs, round_weights_calibrated
from fireq_jax.streams import READERS
from pallas_kernels import dequantize_int4, unpack_int4


def blocks_of(params):
    return {name: params[name] for name in layer_names(params)}


def gradients_of_outputs(model, params, tokens, drawn):
    """Of -log p(drawn) with respect to every weight's output, ``[windows, window, n]``, by the Flax model."""

    original = layers.project

    def loss(errors):
        def perturbed(x, linears, residual=None):
            paths = [linear.path for linear in linears]
            found = original(x, linears, residual)
            return [y + errors[path].reshape(y.shape) for y, path in zip(found, paths, strict=True)]

        with mock.patch.object(layers, "project", perturbed):
            logits = model.apply({"params": params}, tokens)
        return -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1))

    none = {
        (layer, half, name): jnp.zeros((*tokens.shape, size))
        for layer in layer_names(params)
        for half, names in READERS.values()
        for name in names
        for size in [np.prod(params[layer][half][name]["kernel"].shape[: -2 if name == "o" else -1])]
    }
    return jax.grad(loss)(none)


@pytest.mark.parametrize("most", [2048, 16])
def test_moments_are_those_of_the_models_gradients(tiny, monkeypatch, most):
    """With the likeliest token instead of a drawn one, so that both take the same."""
    model, params = tiny
    monkeypatch.setattr(curvature, "MOST_OUTPUTS", most)
    monkeypatch.setattr(jax.random, "categorical", lambda key, logits: jnp.argmax(logits, axis=-1))
    # Windows of a length that no other test has: what is compiled for another may draw tokens.
    tokens = np.random.default_rng(5).integers(0, 131, (6, 11), np.int32)
    found = curvature.loss_curvature(model.config, params, blocks_of(params), tokens)
    drawn = jnp.argmax(model.apply({"params": params}, tokens), axis=-1)
    gradients = gradients_of_outputs(model, params, jnp.asarray(tokens), drawn)
    for layer, its in found.items():
        for place, (half, names) in READERS.items():
            energy = 0
            for name in names:
                g = np.asarray(gradients[layer, half, name], np.float64)
                energy = energy + (g**2).sum(-1)
                g = g.reshape(tokens.size, -1)
                size = its.outputs[name].shape[1]
                assert size <= most
                assert its.outputs[name].shape == (g.shape[1] // size, size, size)
                expected = [g[:, i : i + size].T @ g[:, i : i + size] for i in range(0, g.shape[1], size)]
                expected = np.stack(expected) / tokens.size
                # Both are float32 sums of some hundred terms, in another order.
                np.testing.assert_allclose(its.outputs[name], expected, atol=1e-4 * np.abs(expected).max())
            expected = energy**curvature.TOKEN_EXPONENT
            np.testing.assert_allclose(its.importance[place], expected / expected.mean(), rtol=1e-3, atol=1e-4)


def test_more_windows_than_fit_at_once_add_up(tiny, monkeypatch):
    """The sums over some windows are in those over these and one more, of which nothing is known but what it is."""
    model, params = tiny
    monkeypatch.setattr(curvature, "TOKENS_TOGETHER", 4 * 13 + 5)
    blocks = blocks_of(params)
    tokens = np.random.default_rng(6).integers(0, 131, (5, 13), np.int32)
    four = curvature.loss_curvature(model.config, params, blocks, tokens[:4])
    done = []
    five = curvature.loss_curvature(model.config, params, blocks, tokens, done.append)
    assert done == [4, 5]
    for name in blocks:
        for weight, moments in four[name].outputs.items():
            rest = np.asarray(five[name].outputs[weight] * 5 * 13 - moments * 4 * 13, np.float64)
            # What the last window adds is a sum of squares: no eigenvalue is below 0, but by rounding.
            assert np.linalg.eigvalsh(rest).min() > -1e-4 * np.abs(np.asarray(moments)).max() * 4 * 13
            assert np.trace(rest[0]) > 0


def across_outputs_oracle(w, hessian, step, c, part):
    """Rows of the largest curvature first; behind each part the least-squares targets of all that are left."""
    order = np.argsort(-np.diagonal(c), kind="stable")
    w, step, c = w.astype(np.float64)[order], step[order], c.astype(np.float64)[np.ix_(order, order)]
    targets, codes = w.copy(), np.zeros(w.shape)
    for end in range(part, len(w) + 1, part):
        rows = slice(end - part, end)
        codes[rows] = gptq_oracle(targets[rows], hessian, step[rows])
        errors = codes[:end] * step[:end] - w[:end]
        if end < len(w):
            targets[end:] = w[end:] - np.linalg.solve(c[end:, end:], c[end:, :end] @ errors)
    return codes[np.argsort(order)]


@pytest.mark.parametrize("n", [32, 48])
def test_rounding_across_outputs_is_least_squares(n):
    rng = np.random.default_rng(n)
    w, hessian = correlated(rng, 2 * n, 64)
    hessian = np.asarray(damped(jnp.asarray(hessian)))
    blocks = [np.asarray(damped(jnp.asarray(correlated(rng, 1, n)[1]))) for _ in range(2)]
    step = rng.uniform(0.3, 0.5, w.shape).astype(np.float32)
    arrays = [jnp.asarray(x) for x in (w, hessian, step, np.stack(blocks))]
    codes = np.asarray(gptq_across_outputs(*arrays))
    expected = [
        across_outputs_oracle(w[rows], hessian, step[rows], c, n // OUTPUT_PARTS)
        for rows, c in ((slice(0, n), blocks[0]), (slice(n, 2 * n), blocks[1]))
    ]
    # As for gptq: float32 against float64, and a decision that differs changes those behind it.
    assert (codes != np.concatenate(expected)).mean() < 0.03


def test_outputs_that_do_not_interact_are_rounded_alone():
    rng = np.random.default_rng(7)
    w, hessian = correlated(rng, 32, 64)
    hessian = damped(jnp.asarray(hessian))
    step = jnp.full(w.shape, 0.4)
    c = jnp.diag(jnp.asarray(rng.uniform(0.1, 10, 32), jnp.float32))
    codes = gptq_across_outputs(jnp.asarray(w), hessian, step, c[None])
    np.testing.assert_array_equal(codes, gptq(jnp.asarray(w), hessian, step))


def test_errors_of_outputs_make_up_for_each_other():
    """What is minimised, ``tr(C E H Eᵀ)``, is a good deal smaller; an output that nothing depends on does no harm."""
    rng = np.random.default_rng(8)
    w, hessian = correlated(rng, 96, 128)
    _, c = correlated(rng, 1, 96)
    c[5], c[:, 5] = 0, 0
    recipe = fireq_jax.Recipe(rounding="gptq")
    errors = []
    for curvatures in (None, (jnp.asarray(c[None]),)):
        (parts,) = round_weights_calibrated((jnp.asarray(w),), jnp.asarray(hessian), 64, recipe, curvatures)
        e = np.asarray(dequantize_int4(*parts), np.float64) - w
        assert np.isfinite(e).all()
        errors.append(np.einsum("no,ni,ij,oj->", c.astype(np.float64), e, hessian.astype(np.float64), e))
    assert errors[1] < 0.8 * errors[0]  # 0.71, of these numbers


def test_weights_that_share_an_input_are_rounded_as_if_alone():
    """Whichever of them have as many outputs that interact."""
    rng = np.random.default_rng(9)
    w, hessian = correlated(rng, 96, 64)
    recipe = fireq_jax.Recipe(rounding="gptq")
    pieces = [jnp.asarray(piece) for piece in (w[:16], w[16:48] * 50, w[48:64], w[64:])]
    small = [[correlated(rng, 1, 16)[1] for _ in range(len(piece) // 16)] for piece in pieces[:3]]
    curvatures = tuple(jnp.asarray(np.stack(blocks)) for blocks in [*small, [correlated(rng, 1, 32)[1]]])
    together = round_weights_calibrated(tuple(pieces), jnp.asarray(hessian), 32, recipe, curvatures)
    for piece, curvature_of_piece, parts in zip(pieces, curvatures, together, strict=True):
        (alone,) = round_weights_calibrated((piece,), jnp.asarray(hessian), 32, recipe, (curvature_of_piece,))
        for found, expected in zip(parts[1:], alone[1:], strict=True):
            np.testing.assert_array_equal(found, expected)
        # Batched factorisations round differently: a value half-way between two codes may fall to either side.
        codes = [np.asarray(unpack_int4(x[0])) for x in (parts, alone)]
        assert (codes[0] != codes[1]).mean() < 0.03


def test_progress_ends_with_the_last_step(tiny, text_statistics):
    seen = []
    fireq_jax.quantize(tiny[1], "learned", calibration=text_statistics, progress=lambda *step: seen.append(step))
    done, steps = zip(*seen, strict=True)
    assert list(done) == sorted(set(done))
    assert set(steps) == {done[-1]}


@pytest.fixture(scope="module")
def text_statistics(tiny):
    return fireq_jax.calibrate(*tiny, np.random.default_rng(0).integers(0, 131, 400), window=32)


def test_curvature_needs_a_sequential_recipe():
    with pytest.raises(ValueError, match="curvature=True needs sequential=True"):
        fireq_jax.Recipe(rounding="gptq", curvature=True)

"""Calibration, scale search and error-compensated rounding against numpy, and what they are for: a closer model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_checkpoint
from tiny_models import VARIANTS

import convert
import fireq_jax
from fireq_jax import smoothing
from fireq_jax.numerics import round_weight
from fireq_jax.rounding import gptq, round_weight_calibrated, search_scales
from pallas_kernels import dequantize_int4


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(0).integers(0, 131, 400)


@pytest.fixture(scope="module")
def statistics(tiny, text):
    return fireq_jax.calibrate(*tiny, text, window=32)


def test_statistics_are_those_of_the_float_model(tiny, text, statistics):
    """Layer 0 by hand in numpy: everything up to the rotated keys follows from the embedding."""
    model, params = tiny
    layer = jax.tree.map(lambda x: np.asarray(x, np.float64), params["layers_0"])
    used = text[: len(text) - len(text) % 32]
    x = np.asarray(params["embed"]["embedding"], np.float64)[used]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.rms_norm_eps) * layer["input_norm"]["scale"]
    np.testing.assert_allclose(statistics["layers_0"]["attention_input"], normed.T @ normed / len(used), atol=1e-4)
    frequencies = model.config.rope.inverse_frequencies(16).astype(np.float64)
    angle = (np.arange(len(used)) % 32)[:, None, None] * frequencies

    def rotated(kernel):
        low, high = np.split(np.einsum("ti,hdi->thd", normed, kernel), 2, -1)
        turned = (low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle))
        return np.concatenate(turned, -1)

    queries = rotated(layer["attention"]["q"]["kernel"]).reshape(len(used), 2, 2, 16)
    np.testing.assert_allclose(statistics["layers_0"]["query_energy"], (queries**2).mean((0, 2)), rtol=1e-4)
    keys = rotated(layer["attention"]["k"]["kernel"])
    np.testing.assert_allclose(statistics["layers_0"]["keys"], keys, atol=1e-3)  # fewer tokens than samples: all


def test_statistics_of_deeper_layers_follow_the_float_model(tiny, text, statistics):
    """The second moment of the last MLP input explains what the model computes there: its trace is the mean square."""
    model, params = tiny
    hidden = params["layers_1"]["post_attention_norm"]["scale"]
    trace = np.trace(statistics["layers_1"]["mlp_input"])
    # an RMS norm gives unit mean square times its gain
    assert trace == pytest.approx(float(jnp.sum(hidden**2)), rel=0.5)
    assert model.config.num_layers == len(statistics)


def correlated(rng, n, k, samples=2000):
    mix = rng.normal(size=(k, k)) * np.exp(rng.normal(size=k))
    x = rng.normal(size=(samples, k)) @ mix / np.sqrt(k)
    return rng.normal(size=(n, k)).astype(np.float32), (x.T @ x / samples).astype(np.float32)


def output_error(w, parts, hessian):
    e = np.asarray(dequantize_int4(*parts), np.float64) - w
    return np.einsum("ni,ij,nj->", e, hessian.astype(np.float64), e)


def gptq_oracle(w, hessian, step):
    """GPTQ as published, column by column, with the inverse recomputed for the columns that are left."""
    w, codes = w.astype(np.float64).copy(), np.zeros(w.shape)
    diagonal = np.diagonal(hessian).astype(np.float64)
    h = hessian.astype(np.float64) + np.diag(np.full(len(hessian), 0.01 * diagonal.mean()))
    left = list(np.argsort(-diagonal, kind="stable"))
    while left:
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        i = left[0]
        codes[:, i] = np.clip(np.rint(w[:, i] / step[:, i]), -8, 7)
        error = (w[:, i] - codes[:, i] * step[:, i]) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return codes


@pytest.mark.parametrize("k", [48, 192])
def test_gptq_is_the_published_algorithm(k):
    w, hessian = correlated(np.random.default_rng(k), 12, k)
    step = np.full((12, k), 0.4, np.float32)
    codes = np.asarray(gptq(jnp.asarray(w), jnp.asarray(hessian), jnp.asarray(step)))
    # float32 against float64: where a value is half-way between two codes the decision may differ, and then later ones
    assert (codes != gptq_oracle(w, hessian, step)).mean() < 0.02


@pytest.mark.parametrize("scales", ["sigma_fp8", "sigma_bf16"])
def test_each_step_lowers_the_output_error(scales):
    recipe = fireq_jax.Recipe(scales=scales)
    w, hessian = correlated(np.random.default_rng(0), 32, 256)
    nearest = round_weight(jnp.asarray(w), 64, recipe)
    searched = search_scales(jnp.asarray(w), jnp.asarray(hessian), 64, recipe)
    assert searched[0].dtype == nearest[1].dtype
    step = np.repeat(np.asarray(searched[0], np.float32) * float(searched[1]), 64, 1)
    e = np.clip(np.rint(w / step), -8, 7) * step - w
    errors = [
        output_error(w, nearest, hessian),
        np.einsum("ni,ij,nj->", e, hessian, e),
        output_error(w, round_weight_calibrated(jnp.asarray(w), jnp.asarray(hessian), 64, recipe), hessian),
    ]
    assert errors[1] < 0.95 * errors[0]
    assert errors[2] < 0.7 * errors[1]


def test_scales_may_be_negative_and_are_never_zero():
    w, hessian = correlated(np.random.default_rng(1), 32, 128)
    w[:, 5], w[3] = 6.0, 0.0  # a large positive entry wants code -8; a row of zeros
    scales, tensor_scale = search_scales(jnp.asarray(w), jnp.asarray(hessian), 64, fireq_jax.Recipe())
    values = np.asarray(scales, np.float32) * float(tensor_scale)
    assert (values < 0).any()
    assert (values != 0).all()


def test_dead_inputs_do_no_harm():
    w, hessian = correlated(np.random.default_rng(2), 8, 64)
    hessian[10], hessian[:, 10] = 0, 0
    parts = round_weight_calibrated(jnp.asarray(w), jnp.asarray(hessian), 32, fireq_jax.Recipe())
    assert np.isfinite(np.asarray(dequantize_int4(*parts))).all()


@pytest.mark.parametrize("variant", ["llama3", "smollm2", "biases"])
def test_smoothing_and_key_scales_keep_the_logits(tmp_path, text, variant):
    model, params = convert.load(write_checkpoint(tmp_path, VARIANTS[variant]))
    statistics = fireq_jax.calibrate(model, params, text, window=32)
    tokens = text[None, :20]
    expected = np.asarray(model.apply({"params": params}, tokens))
    changes = {
        "mean": lambda layer, _: smoothing.smooth_by_weights(layer),
        "search": lambda layer, s: smoothing.smooth_by_search(layer, s, (32, 32, 32, 32))[0],
        "fireq keys": lambda layer, s: smoothing.scale_keys_as_fireq(layer, s["keys"], 3),
        "searched keys": lambda layer, s: smoothing.scale_keys_by_search(layer, s["keys"], s["query_energy"]),
    }
    for name, change in changes.items():
        changed = dict(params)
        for layer in statistics:
            changed[layer] = change(params[layer], jax.tree.map(jnp.asarray, statistics[layer]))
        # float32 rounding of factors and their inverses, through two layers
        np.testing.assert_allclose(model.apply({"params": changed}, tokens), expected, atol=1e-4, err_msg=name)


def test_searched_statistics_are_those_of_the_scaled_model(tiny, text, statistics):
    """The second moments that the search hands on are what a new calibration of the scaled model measures."""
    model, params = tiny
    scaled, expected = dict(params), {}
    for layer in statistics:
        scaled[layer], expected[layer] = smoothing.smooth_by_search(
            params[layer], jax.tree.map(jnp.asarray, statistics[layer]), (64, 64, 64, 32)
        )
    measured = fireq_jax.calibrate(model, scaled, text, window=32)
    for layer, parts in expected.items():
        for name in ("attention_input", "attention_output", "mlp_input", "mlp_hidden"):
            np.testing.assert_allclose(
                measured[layer][name], parts[name], rtol=0, atol=1e-3 * np.abs(parts[name]).max(), err_msg=name
            )


def test_key_search_lowers_the_error_of_scores_with_outlier_channels():
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(200, 2, 32)).astype(np.float32)
    keys[:, :, 3] += 20  # a channel that is large in every token, as real keys have them
    energy = np.ones((2, 32), np.float32)

    def error(s):
        from pallas_kernels import quantize_kv

        codes, scale = quantize_kv(jnp.asarray(keys / s))
        restored = np.asarray(dequantize_int4(codes, scale[..., None])) * s
        return ((restored - keys) ** 2 * energy).sum()

    assert error(np.asarray(smoothing._search_key_scales(keys, energy))) < 0.2 * error(np.ones((2, 32), np.float32))


@pytest.mark.parametrize("recipe", ["fireq", "fireq_bf16", "best"])
def test_calibrated_recipes_bring_the_model_closer(tiny, text, statistics, recipe):
    model, params = tiny
    fresh = np.random.default_rng(1).integers(0, 131, 128)
    kl = {}
    for name in ("rtn", recipe):
        quantized = fireq_jax.quantize(params, name, calibration=statistics)
        kl[name] = fireq_jax.evaluate(model, quantized, fresh, reference=params, window=64).kl
        for layer in statistics:
            quantized[layer]["mlp"]["down"]["kernel"].validate()
    # Random weights have no outliers for FireQ's scales to smooth; error compensation helps any weights.
    assert kl[recipe] < (0.8 if recipe == "best" else 1.2) * kl["rtn"]


def test_the_default_recipe_follows_the_calibration(tiny, statistics):
    assert fireq_jax.recipe_of(fireq_jax.quantize(tiny[1])).name == "rtn"
    assert fireq_jax.recipe_of(fireq_jax.quantize(tiny[1], calibration=statistics)).name == "best"


def test_calibrated_checkpoints_round_trip(tmp_path, tiny, statistics):
    quantized = fireq_jax.quantize(tiny[1], calibration=statistics)
    convert.save(tmp_path / "out", tiny[0], quantized)
    restored = convert.load(tmp_path / "out")[1]
    assert jax.tree.structure(restored) == jax.tree.structure(quantized)
    jax.tree.map(np.testing.assert_array_equal, restored, quantized)


def test_bad_calibrations_are_refused(tiny, text, statistics):
    model, params = tiny
    with pytest.raises(ValueError, match="'best' needs calibration=fireq_jax.calibrate"):
        fireq_jax.quantize(params, "best")
    other = {name: {**parts, "mlp_hidden": np.eye(4)} for name, parts in statistics.items()}
    with pytest.raises(ValueError, match=r"layers_0/mlp_hidden must be \(96, 96\), is \(4, 4\)"):
        fireq_jax.quantize(params, "best", calibration=other)
    with pytest.raises(ValueError, match="needs the float parameters"):
        fireq_jax.calibrate(model, fireq_jax.quantize(params), text)
    with pytest.raises(ValueError, match="the text has 10 tokens; calibration needs at least one window of 32"):
        fireq_jax.calibrate(model, params, text[:10], window=32)
    with pytest.raises(ValueError, match="window=512 must be between 1 and the model's 64 positions"):
        fireq_jax.calibrate(model, params, text)

"""Calibration, scale search and error-compensated rounding against numpy, and what they are for: a closer model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_checkpoint
from tiny_models import VARIANTS

import convert
import fireq_jax
from fireq_jax import scaling, smoothing
from fireq_jax.numerics import round_weight
from fireq_jax.quantize import layer_names
from fireq_jax.rounding import corrected_weight, damped, gptq, round_weights_calibrated, search_scales
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
    np.testing.assert_allclose(statistics["layers_0"]["key_absmax"], np.abs(keys).max(0), rtol=1e-4)
    norm = np.hypot(*np.split(keys, 2, -1)).max(0)
    np.testing.assert_allclose(statistics["layers_0"]["key_pair_norm"], norm, rtol=1e-4)


def test_fireq_brings_every_key_channel_to_one(tiny, text, statistics):
    """As the paper's constants say: picked channels reach 1, pairs of the others have a largest norm of 1."""
    model, params = tiny
    scaled = dict(params)
    for layer in layer_names(params):
        s = statistics[layer]
        scaled[layer] = smoothing.scale_keys_as_fireq(params[layer], s["key_absmax"], s["key_pair_norm"], 2)
    after = fireq_jax.calibrate(model, scaled, text, window=32)
    for layer in layer_names(params):
        picked = np.asarray(scaled[layer]["attention"]["post_rope_scale"]) != 1
        assert ((picked.sum(1) >= 2) & (picked.sum(1) <= 4)).all()  # two channels and their partners, or one pair
        np.testing.assert_allclose(after[layer]["key_absmax"][picked], 1, rtol=1e-3)
        others = ~picked[:, : picked.shape[1] // 2]
        np.testing.assert_allclose(after[layer]["key_pair_norm"][others], 1, rtol=1e-3)


def test_calibrations_round_trip_through_a_file(tmp_path, tiny, statistics):
    fireq_jax.save_calibration(tmp_path / "deep" / "statistics.safetensors", statistics)
    restored = fireq_jax.load_calibration(tmp_path / "deep" / "statistics.safetensors")
    assert jax.tree.structure(restored) == jax.tree.structure(statistics)
    jax.tree.map(np.testing.assert_array_equal, restored, statistics)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["statistics.safetensors"]
    with pytest.raises(FileNotFoundError, match="nothing.safetensors is not a file"):
        fireq_jax.load_calibration(tmp_path / "nothing.safetensors")
    (tmp_path / "noise").write_bytes(b"noise" * 10)
    with pytest.raises(ValueError, match="not a safetensors file"):
        fireq_jax.load_calibration(tmp_path / "noise")
    convert.save(tmp_path / "model", *tiny)
    with pytest.raises(ValueError, match="holds calibration format None"):
        fireq_jax.load_calibration(tmp_path / "model" / "model.safetensors")


def test_statistics_of_deeper_layers_follow_the_float_model(tiny, text, statistics):
    """The second moment of the last MLP input explains what the model computes there: its trace is the mean square."""
    model, params = tiny
    hidden = params["layers_1"]["post_attention_norm"]["scale"]
    trace = np.trace(statistics["layers_1"]["mlp_input"])
    # an RMS norm gives unit mean square times its gain
    assert trace == pytest.approx(float(jnp.sum(hidden**2)), rel=0.5)
    assert model.config.num_layers == len(layer_names(statistics))


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
    h = hessian.astype(np.float64)
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
    hessian = np.asarray(damped(jnp.asarray(hessian)))
    step = np.full((12, k), 0.4, np.float32)
    codes = np.asarray(gptq(jnp.asarray(w), jnp.asarray(hessian), jnp.asarray(step)))
    # float32 against float64: where a value is half-way between two codes the decision may differ, and then later ones
    assert (codes != gptq_oracle(w, hessian, step)).mean() < 0.02


@pytest.mark.parametrize("scales", ["sigma_fp8", "sigma_bf16"])
def test_each_step_lowers_the_output_error(scales):
    recipe = fireq_jax.Recipe(scales=scales, rounding="gptq")
    w, hessian = correlated(np.random.default_rng(0), 32, 256)
    nearest = round_weight(jnp.asarray(w), 64, recipe)
    searched = search_scales(jnp.asarray(w), jnp.asarray(hessian), 64, recipe)
    assert searched[0].dtype == nearest[1].dtype
    step = np.repeat(np.asarray(searched[0], np.float32) * float(searched[1]), 64, 1)
    e = np.clip(np.rint(w / step), -8, 7) * step - w
    errors = [
        output_error(w, nearest, hessian),
        np.einsum("ni,ij,nj->", e, hessian, e),
        output_error(w, round_weights_calibrated((jnp.asarray(w),), jnp.asarray(hessian), 64, recipe)[0], hessian),
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
    for moments in (hessian, np.zeros_like(hessian)):
        recipe = fireq_jax.Recipe(rounding="gptq")
        (parts,) = round_weights_calibrated((jnp.asarray(w),), jnp.asarray(moments), 32, recipe)
        assert np.isfinite(np.asarray(dequantize_int4(*parts))).all()


def test_weights_that_share_an_input_are_rounded_as_if_alone():
    w, hessian = correlated(np.random.default_rng(3), 24, 64)
    recipe = fireq_jax.Recipe(rounding="gptq")
    pieces = jnp.asarray(w[:16]), jnp.asarray(w[16:] * 50)
    together = round_weights_calibrated(pieces, jnp.asarray(hessian), 32, recipe)
    for piece, parts in zip(pieces, together, strict=True):
        (alone,) = round_weights_calibrated((piece,), jnp.asarray(hessian), 32, recipe)
        jax.tree.map(np.testing.assert_array_equal, parts, alone)


def test_the_correction_goes_toward_least_squares():
    """Against numpy's least squares: a quarter of the way there, and a smaller error of the outputs."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(500, 16)) @ rng.normal(size=(16, 16))
    noisy = x + rng.normal(size=x.shape) * 0.5
    w = rng.normal(size=(8, 16))
    moments = noisy.T @ noisy
    # Damping by 1 % of the mean second moment is least squares with a pull toward w.
    pull = np.sqrt(0.01 * np.trace(moments) / 16) * np.eye(16)
    best = np.linalg.lstsq(np.concatenate([noisy, pull]), np.concatenate([x, pull]) @ w.T)[0].T
    arrays = [jnp.asarray(a, jnp.float32) for a in (w, moments / 500, x.T @ noisy / 500)]
    moved = np.asarray(corrected_weight(*arrays))
    np.testing.assert_allclose(moved, w + 0.25 * (best - w), atol=1e-4)
    error = [np.square(noisy @ a.T - x @ w.T).sum() for a in (w, moved, best)]
    assert error[2] < error[1] < error[0]


@pytest.mark.parametrize("variant", ["llama3", "smollm2", "biases"])
def test_smoothing_and_key_scales_keep_the_logits(tmp_path, text, variant):
    model, params = convert.load(write_checkpoint(tmp_path, VARIANTS[variant]))
    statistics = fireq_jax.calibrate(model, params, text, window=32)
    tokens = text[None, :20]
    expected = np.asarray(model.apply({"params": params}, tokens))
    changes = {
        "mean": lambda layer, s: smoothing.smooth_by_weights(layer, s, "mean")[0],
        "absmax": lambda layer, s: smoothing.smooth_by_weights(layer, s, "absmax")[0],
        "search": lambda layer, s: smoothing.smooth_by_search(layer, s, (32, 32, 32, 32))[0],
        "fireq keys": lambda layer, s: smoothing.scale_keys_as_fireq(layer, s["key_absmax"], s["key_pair_norm"], 3),
        "searched keys": lambda layer, s: smoothing.scale_keys_by_search(layer, s["keys"], s["query_energy"]),
        "mixed keys": lambda layer, s: smoothing.mix_keys(layer, s["keys"], s["query_energy"], slow),
        "mixed keys without data": lambda layer, _: smoothing.mix_keys_by_weights(layer),
        "mixed values": lambda layer, s: smoothing.mix_values(layer, s)[0],
    }
    slow = smoothing.slow_pairs(model.config)
    assert slow.any()
    assert not slow.all()
    for name, change in changes.items():
        changed = dict(params)
        for layer in layer_names(params):
            changed[layer] = change(params[layer], jax.tree.map(jnp.asarray, statistics[layer]))
        # float32 rounding of factors and their inverses, through two layers
        np.testing.assert_allclose(model.apply({"params": changed}, tokens), expected, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("transform", ["search", "mean", "values"])
def test_statistics_handed_on_are_those_of_the_transformed_model(tiny, text, statistics, transform):
    """The second moments behind a transform are what a new calibration of the transformed model measures."""
    model, params = tiny
    change = {
        "search": lambda layer, s: smoothing.smooth_by_search(layer, s, (64, 64, 64, 32)),
        "mean": lambda layer, s: smoothing.smooth_by_weights(layer, s, "mean"),
        "values": smoothing.mix_values,
    }[transform]
    scaled, expected = dict(params), {}
    for layer in layer_names(params):
        scaled[layer], expected[layer] = change(params[layer], jax.tree.map(jnp.asarray, statistics[layer]))
    measured = fireq_jax.calibrate(model, scaled, text, window=32)
    for layer, parts in expected.items():
        for name in ("attention_input", "attention_output", "mlp_input", "mlp_hidden"):
            np.testing.assert_allclose(
                measured[layer][name], parts[name], rtol=0, atol=1e-3 * np.abs(parts[name]).max(), err_msg=name
            )


def test_mixing_keys_and_values_lowers_the_error_of_an_int4_cache(tiny, text, statistics):
    """On a model with planted outlier channels, as real keys and values have them."""
    model, params = tiny
    rng = np.random.default_rng(0)
    planted = dict(params)
    for layer in layer_names(params):
        # Exact transforms move magnitude into single key and value channels without changing the float model.
        shape = model.config.num_kv_heads, model.config.head_dim
        s = np.where(rng.random(shape) < 0.1, 1 / 20, 1).astype(np.float32)
        pairs = np.tile(s[:, : shape[1] // 2], 2)
        planted[layer] = scaling.scale_values(params[layer], jnp.asarray(s))
        planted[layer] = scaling.scale_keys_before_rope(planted[layer], jnp.asarray(pairs[:, : shape[1] // 2]))
    observed = fireq_jax.calibrate(model, planted, text, window=32)
    fresh = np.random.default_rng(1).integers(0, 131, 128)

    def kl(recipe, calibration=None):
        quantized = fireq_jax.quantize(planted, recipe, calibration=calibration)
        return fireq_jax.evaluate(model, quantized, fresh, reference=planted, window=64).kl

    plain = kl(fireq_jax.Recipe(weights="none"))
    assert kl("kv4", observed) < 0.3 * plain
    assert kl("kv4") < 0.5 * plain


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


@pytest.mark.parametrize("recipe", ["data_free", "fireq", "fireq_bf16", "best", "learned"])
def test_calibrated_recipes_bring_the_model_closer(tiny, text, statistics, recipe):
    model, params = tiny
    fresh = np.random.default_rng(1).integers(0, 131, 128)
    kl = {}
    for name in ("rtn", recipe):
        quantized = fireq_jax.quantize(params, name, calibration=statistics)
        kl[name] = fireq_jax.evaluate(model, quantized, fresh, reference=params, window=64).kl
        for layer in layer_names(params):
            quantized[layer]["mlp"]["down"]["kernel"].validate()
    # Random weights have no outliers for scales from weights to smooth; error compensation helps any weights.
    assert kl[recipe] < (0.8 if recipe in ("best", "learned") else 1.2) * kl["rtn"]


def test_sequential_rounding_sees_the_quantised_models_inputs(tiny, text, statistics):
    """The moments that rounding gets are those of the model quantised so far, by another way: whole forward passes."""
    from fireq_jax.streams import Streams

    model, params = tiny
    # Without rounding of activations: one that falls to the other side would move everything behind it.
    recipe = fireq_jax.Recipe(kv_cache="float", activations="none")
    tokens = statistics["tokens"]
    nearest = fireq_jax.quantize(params, recipe)
    streams = Streams(model.config, params["embed"]["embedding"], tokens, recipe)
    seen = {}

    def round_readers(layer, half, names, hessian, cross):
        seen[index, names[0]] = np.asarray(hessian), np.asarray(cross)
        replaced = {name: nearest[f"layers_{index}"][half][name] for name in names}
        return {**layer, half: {**layer[half], **replaced}}

    for index in range(model.config.num_layers):
        streams.round_block(params[f"layers_{index}"], round_readers)

    def sowed(weights, tree):
        bare = {key: value for key, value in weights.items() if key != "recipe"}
        _, state = jax.jit(lambda p: model.apply({"params": p}, tokens, mutable=["statistics"]))(bare)
        rows = state["statistics"]["layers_1"][tree[0]][tree[1]]["input"][0]
        return np.asarray(rows, np.float64).reshape(tokens.size, -1)

    for name, tree in {"q": ("attention", "q"), "gate": ("mlp", "gate"), "down": ("mlp", "down")}.items():
        ours, reference = sowed(nearest, tree), sowed(params, tree)
        hessian, cross = seen[1, name]
        np.testing.assert_allclose(hessian, ours.T @ ours / tokens.size, atol=1e-4 * np.abs(hessian).max())
        np.testing.assert_allclose(cross, reference.T @ ours / tokens.size, atol=1e-4 * np.abs(hessian).max())


def test_the_default_recipe_follows_the_calibration(tiny, statistics):
    assert fireq_jax.recipe_of(fireq_jax.quantize(tiny[1])).name == "data_free"
    assert fireq_jax.recipe_of(fireq_jax.quantize(tiny[1], calibration=statistics)).name == "best"


@pytest.mark.parametrize("recipe", ["best", "kv4"])
def test_calibrated_checkpoints_round_trip(tmp_path, tiny, statistics, recipe):
    quantized = fireq_jax.quantize(tiny[1], recipe, calibration=statistics)
    convert.save(tmp_path / "out", tiny[0], quantized)
    restored = convert.load(tmp_path / "out")[1]
    assert jax.tree.structure(restored) == jax.tree.structure(quantized)
    jax.tree.map(np.testing.assert_array_equal, restored, quantized)


def test_bad_calibrations_are_refused(tiny, text, statistics):
    model, params = tiny
    with pytest.raises(ValueError, match="'best' needs calibration=fireq_jax.calibrate"):
        fireq_jax.quantize(params, "best")
    other = {**statistics, "layers_0": {**statistics["layers_0"], "mlp_hidden": np.eye(4)}}
    with pytest.raises(ValueError, match=r"layers_0/mlp_hidden must be \(96, 96\), is \(4, 4\)"):
        fireq_jax.quantize(params, "best", calibration=other)
    with pytest.raises(ValueError, match="the calibration lacks 'config' or 'tokens'"):
        fireq_jax.quantize(params, "best", calibration={"layers_0": statistics["layers_0"]})
    with pytest.raises(ValueError, match="needs the float parameters"):
        fireq_jax.calibrate(model, fireq_jax.quantize(params), text)
    with pytest.raises(ValueError, match="the text has 10 tokens; calibration needs at least one window of 32"):
        fireq_jax.calibrate(model, params, text[:10], window=32)
    with pytest.raises(ValueError, match="the text has 0 tokens; calibration needs at least one window of 1"):
        fireq_jax.calibrate(model, params, [])
    with pytest.raises(ValueError, match="window=512 must be between 1 and the model's 64 positions"):
        fireq_jax.calibrate(model, params, text, window=512)


@pytest.mark.parametrize("variant", ["llama2", "smollm2", "biases"])
def test_refinement_differentiates_the_model_that_runs(tmp_path, text, variant):
    """Its forward pass gives the model's own logits, float and quantised, before any step is taken."""
    from fireq_jax import differentiable

    model, params = convert.load(write_checkpoint(tmp_path, VARIANTS[variant]))
    statistics = fireq_jax.calibrate(model, params, text, window=32)
    tokens = statistics["tokens"][:2]
    expected = {None: jax.nn.log_softmax(model.apply({"params": params}, tokens))}
    found = {
        None: differentiable.log_probabilities(
            model.config, None, differentiable.stacked(params, layer_names(params)), tokens
        )
    }
    for kind in ("float", "int4"):
        activations = "none" if kind == "float" else "fp8"
        recipe = fireq_jax.Recipe(keys="hadamard", values="hadamard", kv_cache=kind, activations=activations)
        quantized = fireq_jax.quantize(params, recipe, calibration=statistics)
        cache = fireq_jax.KVCache.zeros(model.config, 2, 32, kind, model.dtype)
        expected[kind] = jax.nn.log_softmax(model.apply({"params": quantized}, tokens, None, cache))
        stacked = differentiable.stacked(quantized, layer_names(params))
        found[kind] = differentiable.log_probabilities(model.config, recipe, stacked, tokens)
    for kind in (None, "float"):
        np.testing.assert_allclose(found[kind], expected[kind], atol=1e-3)
    # An activation on the edge between two e4m3 or int4 values falls to either side, and moves what follows: what can
    # be asked is that this is small beside what the rounding does.
    effect = np.abs(expected["int4"] - expected[None]).mean()
    assert np.abs(found["int4"] - expected["int4"]).mean() < 0.3 * effect


def test_refinement_lowers_the_divergence_it_trains_on(tiny, text, statistics):
    model, params = tiny
    used = statistics["tokens"].reshape(-1)
    kl = {}
    for refined in (False, True):
        recipe = fireq_jax.Recipe(smoothing="mean", refine=refined)
        quantized = fireq_jax.quantize(params, recipe, calibration=statistics)
        kl[refined] = fireq_jax.evaluate(model, quantized, used, reference=params, window=32).kl
    assert kl[True] < kl[False]


def test_refinement_takes_blocks_by_number(tiny, statistics):
    """A pytree may list its blocks in any order."""
    params = tiny[1]
    recipe = fireq_jax.Recipe(smoothing="mean", refine=True)
    expected = fireq_jax.quantize(params, recipe, calibration=statistics)
    found = fireq_jax.quantize(dict(reversed(params.items())), recipe, calibration=statistics)
    jax.tree.map(np.testing.assert_array_equal, found, expected)

from pathlib import Path

import jax
import numpy as np
import pytest

import fireq_jax
from pallas_kernels import quantize_fp8


def log_probabilities(model, params, tokens):
    logits = np.asarray(model.apply({"params": params}, np.asarray(tokens)[None]), np.float64)[0]
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


@pytest.fixture(scope="module")
def text():
    return np.random.default_rng(0).integers(0, 131, 70)


@pytest.mark.parametrize(("window", "stride"), [(32, None), (32, 32), (32, 8), (64, 20), (35, None)])
def test_perplexity_by_hand(tiny, text, window, stride):
    model, params = tiny
    step = stride or window
    losses, scored = [], {0}
    for start in range(0, len(text), step):
        end = min(start + window, len(text))
        log_p = log_probabilities(model, params, text[start:end])
        for target in range(start + 1, end):
            if target not in scored:
                losses.append(-log_p[target - start - 1, text[target]])
        scored |= set(range(start, end))
        if end == len(text):
            break
    score = fireq_jax.evaluate(model, params, text, window=window, stride=stride)
    assert score.scored_tokens == len(losses)
    assert score.perplexity == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert (score.kl, score.top1_agreement, score.reference_perplexity) == (None, None, None)


def test_divergence_and_agreement_by_hand(tiny, text):
    model, params = tiny
    quantized = fireq_jax.quantize(params, fireq_jax.Recipe(activations="none", kv_cache="float"))
    restored = {
        key: value for key, value in quantized.items() if key != "recipe"
    }  # without a recipe, attention runs as in the float model: the same numbers for a float cache
    p, q = (log_probabilities(model, weights, text[:40])[:-1] for weights in (params, restored))
    score = fireq_jax.evaluate(model, quantized, text[:40], reference=params, window=40)
    assert score.kl == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-3)
    assert score.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    expected = np.exp(-np.mean(np.take_along_axis(p, text[1:40, None], -1)))
    assert score.reference_perplexity == pytest.approx(expected, rel=1e-5)
    assert score.keys_values == "float, cache"


def test_a_model_agrees_with_itself(tiny, text):
    model, params = tiny
    score = fireq_jax.evaluate(model, params, text, reference=params, window=32)
    assert score.kl == pytest.approx(0, abs=1e-6)
    assert score.top1_agreement == 1


def test_the_cache_path_is_what_decoding_sees(tiny, text):
    """Teacher-forced logits through the cache are those of one decode step after another."""
    model, params = tiny
    quantized = fireq_jax.quantize(params)
    tokens = text[None, :12]
    cache = fireq_jax.KVCache.zeros(model.config, 1, 12)
    whole = model.apply({"params": quantized}, tokens, None, cache)
    decode = jax.jit(lambda token, cache: model.apply({"params": quantized}, token, cache, method="decode"))
    for i in range(12):
        step, cache = decode(tokens[:, i : i + 1], cache)
        np.testing.assert_allclose(step[:, 0], whole[:, i], atol=1e-4)


def test_prefill_keeps_more_than_the_cache(tiny, text):
    """Fresh keys and values in e4m3 are closer to the float model than their int4 codes."""
    model, params = tiny
    quantized = fireq_jax.quantize(params)
    kl = {
        through: fireq_jax.evaluate(model, quantized, text, reference=params, window=64, through=through).kl
        for through in ("cache", "prefill")
    }
    assert 0 < kl["prefill"] < kl["cache"]


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        ([1], {}, "the text has 1 tokens; at least 2"),
        ([1, 200], {}, "token ids 1 to 200 leave the vocabulary of 131"),
        ([1, 2], {"window": 65}, "window=65 must be between 2 and the model's 64 positions"),
        ([1, 2], {"window": 1}, "window=1 must be"),
        ([1, 2, 3], {"window": 2, "stride": 0}, "stride=0 must be at least 1"),
        ([1, 2], {"window": 2, "through": "sieve"}, "through='sieve' must be"),
    ],
)
def test_bad_texts_and_windows_are_refused(tiny, tokens, settings, message):
    with pytest.raises(ValueError, match=message):
        fireq_jax.evaluate(*tiny, tokens, **({"window": 32} | settings))


def test_accuracy_table_rounds_the_inputs_of_all_linear_layers(tiny, monkeypatch):
    """Of a float model, for the row "A8": four inputs in a block, and nothing outside the context."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    import accuracy

    model, params = tiny
    seen = []

    def counted(x, axis):
        seen.append(x.shape)
        return quantize_fp8(x, axis=axis)

    monkeypatch.setattr(accuracy, "quantize_fp8", counted)
    marked, tokens = accuracy.with_rounded_inputs(params), np.arange(9)[None]
    with accuracy.fp8_inputs():
        rounded = model.apply({"params": marked}, tokens)
        plain = model.apply({"params": params}, tokens)
    assert len(seen) == 4 * model.config.num_layers
    np.testing.assert_array_equal(plain, model.apply({"params": params}, tokens))
    # e4m3 is within a sixteenth of every input: logits move, by less than they are large.
    moved = np.linalg.norm(rounded - plain) / np.linalg.norm(plain)
    assert 1e-3 < moved < 0.3

"""The float model against transformers' LlamaForCausalLM and MistralForCausalLM (tests/golden/make_golden.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_checkpoint
from tiny_models import TOKENS, VARIANTS

import convert
import fireq_jax

GOLDEN = Path(__file__).parent / "golden"
# Both sides compute in float32 and sum in different orders. Relative to the logits' own size, since their rounding
# error is: SmolLM2's reach 33.
TOLERANCE = 1e-4


def assert_logits_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=TOLERANCE * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_models_match_transformers(variant, tmp_path):
    model, params = convert.load(write_checkpoint(tmp_path, VARIANTS[variant]))
    expected = np.load(GOLDEN / "tiny.npz")[variant]
    assert np.abs(expected).max() > 1  # the comparison would mean little on logits near zero
    assert_logits_close(model.apply({"params": params}, TOKENS), expected)


@pytest.mark.smollm2
def test_smollm2_matches_transformers(smollm2):
    model, params = smollm2
    golden = np.load(GOLDEN / "smollm2.npz")
    logits = model.apply({"params": params}, golden["tokens"])
    assert_logits_close(logits[..., :: int(golden["step"])], golden["logits"])


@pytest.mark.parametrize("variant", ["llama31", "biases", "smollm2"])
def test_prefill_and_decode_give_the_logits_of_the_whole_sequence(variant, tmp_path):
    model, params = convert.load(write_checkpoint(tmp_path, VARIANTS[variant]))
    whole = np.load(GOLDEN / "tiny.npz")[variant]
    cache = fireq_jax.KVCache.zeros(model.config, 2, 16, "float", jnp.float32)
    lengths = np.array([4, 6], np.int32)
    logits, cache = model.apply({"params": params}, TOKENS[:, :6], lengths, cache, method="prefill")
    assert_logits_close(logits, whole[[0, 1], lengths - 1])
    for step in range(4):
        at = lengths + step
        logits, cache = model.apply({"params": params}, TOKENS[[0, 1], at][:, None], cache, method="decode")
        assert_logits_close(logits[:, 0], whole[[0, 1], at])
    np.testing.assert_array_equal(cache.lengths, lengths + 4)


def test_continued_prefill_gives_the_logits_of_the_whole_sequence(tiny):
    model, params = tiny
    whole = np.load(GOLDEN / "tiny.npz")["llama3"]
    cache = fireq_jax.KVCache.zeros(model.config, 2, 16, "float", jnp.float32)
    first, second = np.array([3, 5], np.int32), np.array([5, 2], np.int32)
    _, cache = model.apply({"params": params}, TOKENS[:, :5], first, cache, method="prefill")
    rest = np.stack([row[n : n + 5] for row, n in zip(TOKENS, first, strict=True)])
    logits, _ = model.apply({"params": params}, rest, second, cache, True, method="prefill")
    assert_logits_close(logits, whole[[0, 1], first + second - 1])


def test_a_quantised_sequence_that_grows_token_by_token_is_as_good_as_its_prefill(tiny):
    model, params = tiny
    expected = np.load(GOLDEN / "tiny.npz")["llama3"]
    params = fireq_jax.quantize(params)
    length, begun = TOKENS.shape[1], 2

    @jax.jit
    def prefill(tokens):
        cache, lengths = fireq_jax.KVCache.zeros(model.config, 2, 16), jnp.full(2, tokens.shape[1], jnp.int32)
        return model.apply({"params": params}, tokens, lengths, cache, method="prefill")

    decode = jax.jit(lambda tokens, cache: model.apply({"params": params}, tokens, cache, method="decode"))
    _, cache = prefill(TOKENS[:, :begun])
    for i in range(begun, length):
        logits, cache = decode(TOKENS[:, i : i + 1], cache)
    grown, (whole, _) = logits[:, 0], prefill(TOKENS)
    # A prompt attends to keys and values in e4m3, what grows to int4 ones: their errors differ, and none is of another
    # size than that of quantisation as a whole.
    error = distance(whole, expected[:, length - 1])
    assert distance(grown, expected[:, length - 1]) < 1.5 * error
    assert distance(grown, whole) < 1.5 * error


def test_initialised_model_has_the_tree_that_load_makes(tiny):
    model, params = tiny
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS)["params"])
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, params)


def distance(actual, expected):
    return float(np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected))


def test_bfloat16_float_model_is_close_to_the_float32_one(tiny):
    model, params = tiny
    expected = np.load(GOLDEN / "tiny.npz")["llama3"]
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    narrow = model.clone(dtype=jnp.bfloat16)
    # 8 significant bits, two layers, a handful of roundings in each
    assert distance(narrow.apply({"params": half}, TOKENS), expected) < 0.02
    cache = fireq_jax.KVCache.zeros(model.config, 2, 16, "float", jnp.bfloat16)
    assert distance(narrow.apply({"params": half}, TOKENS, None, cache), expected) < 0.02


@pytest.mark.parametrize("through", ["cache", "prefill"])
def test_bfloat16_adds_little_to_the_error_of_quantisation(tiny, through):
    model, params = tiny
    expected = np.load(GOLDEN / "tiny.npz")["llama3"]
    params = fireq_jax.quantize(params)
    errors = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        cache = fireq_jax.KVCache.zeros(model.config, 2, 16)
        logits = model.clone(dtype=dtype).apply({"params": params}, TOKENS, None, cache, through)
        errors[dtype] = distance(logits, expected)
    # bf16 rounding is a sixteenth of e4m3's; where it flips an int4 rounding, one error replaces another as large
    assert errors[jnp.bfloat16] < 1.25 * errors[jnp.float32]

"""The lm-evaluation-harness adapter against scores computed here from the model's own logits."""

import json

import jax
import lm_eval
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import fireq_jax
from fireq_jax.harness import FireqLM

QUESTIONS = [
    ("The capital of France is", [" Paris", " a banana", " seven"], 0),
    ("Two plus two equals", [" purple", " four", " the sea"], 1),
    ("Water freezes at zero degrees", [" guitar", " Tuesday", " Celsius"], 2),
    ("The sun rises in the", [" east", " refrigerator", " keyboard of a piano"], 0),
]


@pytest.fixture(scope="module")
def lm(smollm2, smollm2_tokenizer):
    return FireqLM(*smollm2, smollm2_tokenizer, batch_size=4, max_length=64)


@pytest.fixture(scope="module")
def log_likelihood(smollm2):
    """Scores a continuation by one plain forward pass, in float64 behind the logits."""
    model, params = smollm2
    forward = jax.jit(lambda params, ids, cache: model.apply({"params": params}, ids, None, cache))

    def score(context, continuation, weights=params):
        ids = np.zeros((1, 160), np.int32)
        length = len(context) + len(continuation)
        ids[0, :length] = context + continuation
        cache = None if weights is params else fireq_jax.KVCache.zeros(model.config, 1, 160)
        logits = np.asarray(forward(weights, ids, cache)[0, : length - 1], np.float64)
        logits -= logits.max(-1, keepdims=True)
        rows = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[-len(continuation) :]
        found = rows[np.arange(len(continuation)), continuation]
        return found.sum(), bool((rows.argmax(-1) == continuation).all())

    return score


def requests(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


@pytest.mark.smollm2
def test_log_likelihoods_are_those_of_the_logits(log_likelihood, smollm2_tokenizer, lm):
    pairs = [(question, answer) for question, answers, _ in QUESTIONS for answer in answers] + [("", "Once upon a")]
    for (question, answer), (score, greedy) in zip(
        pairs, lm.loglikelihood(requests("loglikelihood", *pairs)), strict=True
    ):
        context = smollm2_tokenizer(question)["input_ids"] if question else [smollm2_tokenizer.bos_token_id]
        expected, likeliest = log_likelihood(context, smollm2_tokenizer(answer)["input_ids"])
        # float32 sums in another order
        assert score == pytest.approx(expected, abs=2e-3)
        assert greedy == likeliest


@pytest.mark.smollm2
def test_long_texts_are_scored_in_windows(log_likelihood, smollm2_tokenizer, lm):
    text = "The quick brown fox jumps over the lazy dog, and then it rests under a tree. " * 8
    ids = smollm2_tokenizer(text)["input_ids"]
    assert 64 < len(ids) < 192
    windows = [([smollm2_tokenizer.bos_token_id], ids[:64])]
    # later windows are filled with as much context as fits
    for start in range(64, len(ids), 64):
        part = ids[start : start + 64]
        end = start + len(part)
        windows.append((ids[max(0, end - 65) : start], part))
    expected = sum(log_likelihood(*window)[0] for window in windows)
    (score,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert score == pytest.approx(expected, rel=1e-4)


@pytest.mark.smollm2
def test_generation_stops_where_the_task_says(smollm2, smollm2_tokenizer, lm):
    model, params = smollm2
    prompt = "The capital of France is"
    free = fireq_jax.generate(model, params, smollm2_tokenizer(prompt)["input_ids"], max_new_tokens=12).to_lists()[0]
    whole = smollm2_tokenizer.decode(free, skip_special_tokens=True)
    stop = whole[5]
    settings = [{"until": [], "max_gen_toks": 12}, {"until": [stop], "max_gen_toks": 12}]
    texts = lm.generate_until(requests("generate_until", *((prompt, s) for s in settings)))
    assert texts == [whole, whole.split(stop)[0]]
    with pytest.raises(ValueError, match="max_gen_toks=64 must be between 1 and 63"):
        lm.generate_until(requests("generate_until", (prompt, {"max_gen_toks": 64})))


@pytest.mark.smollm2
def test_the_standard_harness_runs_a_local_task_on_a_quantised_model(
    tmp_path, log_likelihood, smollm2, smollm2_tokenizer
):
    """A task in two files on disk, nothing downloaded; the accuracy is that of the likeliest answers."""
    model, params = smollm2
    quantized = fireq_jax.quantize(params, "rtn")
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    task = {
        "task": "facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "facts.yaml").write_text(json.dumps(task))  # JSON is YAML
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    lm = FireqLM(model, quantized, smollm2_tokenizer, batch_size=4, max_length=64)
    result = lm_eval.simple_evaluate(model=lm, tasks=["facts"], task_manager=manager, bootstrap_iters=0)
    right = 0
    for question, answers, answer in QUESTIONS:
        context = smollm2_tokenizer(question)["input_ids"]
        scores = [log_likelihood(context, smollm2_tokenizer(text)["input_ids"], quantized)[0] for text in answers]
        right += int(np.argmax(scores)) == answer
    assert result["results"]["facts"]["acc,none"] == pytest.approx(right / len(QUESTIONS))


@pytest.mark.smollm2
def test_lengths_beyond_the_model_are_refused(smollm2, smollm2_tokenizer):
    with pytest.raises(ValueError, match="max_length=10000 must be between 2 and the model's 8192 positions"):
        FireqLM(*smollm2, smollm2_tokenizer, max_length=10000)

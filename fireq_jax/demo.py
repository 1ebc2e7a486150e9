"""The whole way on one model: load, quantise, compare sizes, perplexity and an answer."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fireq_jax.calibrate import calibrate
from fireq_jax.calibration_text import calibration_tokens, default_calibration_text
from fireq_jax.config import Recipe, resolve_recipe
from fireq_jax.evaluate import evaluate
from fireq_jax.generate import generate
from fireq_jax.kv_cache import cache_bytes_per_token
from fireq_jax.quantize import parameter_bytes, quantize

QUESTION = "What is gravity? Answer in two or three sentences."


def compute_dtype() -> Any:
    """bfloat16 where it is fast; float32 on a CPU, which would only convert back and forth."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def calibrated(
    model: Any,
    params: dict[str, Any],
    tokenizer: Any,
    recipe: Recipe | str,
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
    text: str | None = None,
    count: int = 4096,
) -> dict[str, Any]:
    """Quantises by a recipe, calibrating first if it asks for it.

    Args:
      model: the Llama.
      params: its float parameters.
      tokenizer: its tokenizer.
      recipe: a recipe or a preset's name.
      progress: makes the context of a named progress bar.
      text: calibration text; None takes :func:`default_calibration_text`.
      count: tokens of it to use.
    """
    statistics = None
    if resolve_recipe(recipe).needs_calibration:
        tokens = calibration_tokens(tokenizer, default_calibration_text() if text is None else text, count)
        with progress("calibrating") as report:
            statistics = calibrate(model, params, tokens, progress=report)
    with progress("quantising") as report:
        return jax.block_until_ready(quantize(params, recipe, calibration=statistics, progress=report))


def chat_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, ready for the assistant's turn.

    Raises:
      ValueError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError("this model's tokenizer has no chat template; use `fireq-jax generate` with a plain prompt")
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


def run_demo(
    source: Path,
    recipe: str,
    max_new_tokens: int,
    stage: Callable[[str], AbstractContextManager[Any]],
    progress: Callable[[str], AbstractContextManager[Callable[[int, int], None]]],
) -> dict[str, Any]:
    """Runs the demo.

    Args:
      source: the model, as for ``convert.load``.
      recipe: a preset's name.
      max_new_tokens: of each answer.
      stage: makes the context, such as a spinner, in which a named stage runs.
      progress: makes the context of a named progress bar.

    Returns:
      ``bytes_float``, ``bytes_quantized``, ``cache_bytes_per_token_float``, ``cache_bytes_per_token_quantized``,
      ``perplexity_float``, ``perplexity_quantized``, ``kl``, ``scored_tokens``, ``question``, ``text_float``,
      ``text_quantized``, ``recipe``, ``device`` and ``seconds``.
    """
    import convert

    began = time.perf_counter()
    with stage("loading the model"):
        model, params = convert.load(source, dtype=jnp.bfloat16)
        tokenizer = convert.load_tokenizer(source)
        model = model.clone(dtype=compute_dtype())
    quantized = calibrated(model, params, tokenizer, recipe, progress)

    passage = tokenizer(files("fireq_jax").joinpath("data/passage.txt").read_text("utf-8"))["input_ids"]
    with stage("perplexity of both models"):
        score = evaluate(model, quantized, passage, reference=params)

    prompt = chat_prompt(tokenizer, [{"role": "user", "content": QUESTION}])
    answers = {}
    for name, weights in (("float", params), ("quantised", quantized)):
        with stage(f"an answer from the {name} model"):
            tokens = generate(model, weights, prompt, max_new_tokens=max_new_tokens).to_lists()[0]
        answers[name] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return {
        "bytes_float": parameter_bytes(params),
        "bytes_quantized": parameter_bytes(quantized),
        "cache_bytes_per_token_float": cache_bytes_per_token(model.config, "float"),
        "cache_bytes_per_token_quantized": cache_bytes_per_token(model.config, "int4"),
        "perplexity_float": score.reference_perplexity,
        "perplexity_quantized": score.perplexity,
        "kl": score.kl,
        "scored_tokens": score.scored_tokens,
        "question": QUESTION,
        "text_float": answers["float"],
        "text_quantized": answers["quantised"],
        "recipe": recipe,
        "device": jax.devices()[0].device_kind,
        "seconds": time.perf_counter() - began,
    }

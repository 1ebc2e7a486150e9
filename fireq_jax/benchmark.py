"""Speed of a Llama of given sizes, quantised and in bf16, through the same code in one run.

Weights are random and made on the device, since speed does not depend on what they say. Times are wall-clock times of
whole calls, or of a loop on the device over many blocks, so they hold what a user waits for: launches, gaps, sampling.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any, Literal

import jax
import jax.numpy as jnp

from fireq_jax import timed_calls, torch_benchmark
from fireq_jax.config import LlamaConfig, RopeConfig, resolve_recipe
from fireq_jax.kernel_profile import kernel_times
from fireq_jax.kv_cache import cache_bytes_per_token
from fireq_jax.llama import Llama
from fireq_jax.quantize import cache_kind, parameter_bytes, quantize
from fireq_jax.timed_calls import (
    FP8_OPTIONS,
    Call,
    Measured,
    Params,
    copy_bandwidth,
    decode_call,
    feed_forward_call,
    feed_forward_fp8_call,
    generate_call,
    prefill_call,
    random_params,
    random_tokens,
    step_bytes,
)

_LLAMA3 = RopeConfig(theta=5e5)
SIZES = {
    "llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, 131072),
    "llama-2-13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128, 131072),
    "llama-3-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 131072, rope=_LLAMA3),
    "llama-3.2-1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 131072, rope=_LLAMA3, tie_word_embeddings=True),
    "llama-3.2-3b": LlamaConfig(128256, 3072, 8192, 28, 24, 8, 128, 131072, rope=_LLAMA3, tie_word_embeddings=True),
    "toy": LlamaConfig(256, 128, 256, 2, 2, 1, 64, 1024),
}
# A random model's logits move by a tenth when its embedding moves by a unit of bf16, since activations then fall to
# other sides of their roundings. So kernels are not held to the reference implementation's logits but to its distance
# from the bf16 model's, times this.
CHECKED_TO = 1.25


def run_benchmark(
    name: str,
    *,
    recipe: str = "rtn",
    lm_head: Literal["float", "int8", "fp8", "int4"] = "float",
    feed_forward: Sequence[int] = (),
    prefill: Sequence[tuple[int, int]] = (),
    decode: Sequence[tuple[int, int]] = (),
    generate: Sequence[tuple[int, int]] = (),
    new_tokens: int = 64,
    operators: Literal["first", "all", "none"] = "first",
    fp8: bool = False,
    with_torch: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    save: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Measures a model and the same model in bf16.

    Args:
      name: a key of ``SIZES``.
      recipe: a preset that needs no calibration.
      lm_head: the recipe's output projection, see :class:`fireq_jax.config.Recipe`.
      feed_forward: numbers of tokens at which a feed-forward block (norm, MLP, residual sum) is measured.
      prefill: pairs of batch size and prompt length.
      decode: pairs of batch size and context length.
      generate: pairs of batch size and prompt length, of which :func:`fireq_jax.generate` makes ``new_tokens`` more,
        drawn with ``SAMPLING``: prompt, loop and draws in one call.
      new_tokens: tokens generated per sequence at each of these.
      operators: which cases of ``prefill`` and of ``decode`` are profiled kernel by kernel (on a GPU).
      fp8: whether the block is measured in fp8 by XLA alone, too, at multiples of 16 tokens.
      with_torch: whether transformers' Llama in torch is measured, too, at ``prefill`` and ``decode``.
      progress: called with what comes next.
      save: called with what there is of the result, whenever a case is done.

    Returns:
      Sizes, device, versions, and a list of cases per kind, each with ``int4`` and ``bf16`` measurements: None where
      the device's memory does not suffice.

    Raises:
      ValueError: there are no such sizes, or a case does not fit the model's positions.
      ModuleNotFoundError: torch or transformers is missing.
      RuntimeError: the kernels' logits are further from the bf16 model's than those of the reference implementation;
        nothing was timed.
    """
    if name not in SIZES:
        raise ValueError(f"unknown sizes {name!r}; known: {', '.join(SIZES)}")
    config = SIZES[name]
    for batch, length in (*prefill, *((b, context + new_tokens) for b, context in (*decode, *generate))):
        if batch < 1 or not 1 <= length <= config.max_positions:
            raise ValueError(f"{batch} x {length} tokens: there are {config.max_positions} positions")
    of_torch = None
    if with_torch:  # before this process takes the device's memory
        progress("transformers in torch")
        of_torch = torch_benchmark.run(_transformers_config(config), prefill, decode, new_tokens)
    model = Llama(config)
    progress("making weights")
    params: dict[str, Params] = {"bf16": random_params(config)}
    settings = replace(resolve_recipe(recipe), lm_head=lm_head)
    params["int4"] = jax.block_until_ready(quantize(params["bf16"], settings))
    progress("checking against the reference implementation")
    distances = distances_from_float(model, params["int4"], params["bf16"])
    if not distances["kernels"] <= CHECKED_TO * distances["reference"]:
        raise RuntimeError(
            f"the kernels' logits are {distances['kernels']:.3f} from the bf16 model's, those of the reference "
            f"implementation {distances['reference']:.3f}; at most {CHECKED_TO} times that is expected"
        )
    result: dict[str, Any] = {
        "sizes": name,
        "config": asdict(config),
        "recipe": recipe,
        "lm_head": lm_head,
        "device": jax.devices()[0].device_kind,
        "versions": {package: version(package) for package in ("jax", "jaxlib", "flax")},
        "distances_from_bf16": distances,
        "copy_bytes_per_second": copy_bandwidth(),
        "parameter_bytes": {kind: parameter_bytes(p) for kind, p in params.items()},
        "cache_bytes_per_token": {
            kind: cache_bytes_per_token(config, cache_kind(p)) for kind, p in params.items()
        },
        "torch": of_torch,
        "feed_forward": [],
        "prefill": [],
        "decode": [],
        "generate": [],
        "operators": {},
        "decode_profile": "loop",
    }  # fmt: skip

    profiled = {
        (what, *case)
        for what, cases in (("prefill", prefill), ("decode", decode))
        for case in {"first": cases[:1], "all": cases, "none": ()}[operators]
    }

    def measured(what: str, call_of: Callable[..., Call], *case: int) -> dict[str, Measured]:
        """Per kind of model; of some cases the kernels, too."""
        found = {}
        for kind, p in params.items():
            progress(f"{kind}: {what} {' x '.join(map(str, case))}")
            call = call_of(model, p, *case)
            began = time.perf_counter()
            compiled = call.compile()
            compile_seconds = time.perf_counter() - began
            found[kind] = call.measure(compiled)._replace(compile_seconds=compile_seconds)
            if (what, *case) in profiled and found[kind].seconds is not None:
                times = kernel_times(call.bound(compiled), call.parts)
                result["operators"].setdefault(f"{what} {case[0]} x {case[1]}", {})[kind] = times
        return found

    for tokens in feed_forward:
        seconds = {kind: m.seconds for kind, m in measured("feed-forward", feed_forward_call, tokens).items()}
        if fp8 and tokens % 16 == 0:  # cuBLASLt takes no other number in fp8
            progress(f"fp8: feed-forward {tokens}")
            call = feed_forward_fp8_call(config, tokens)
            seconds["fp8"] = call.measure(call.compile(FP8_OPTIONS)).seconds
        result["feed_forward"].append({"tokens": tokens} | _by_kind("microseconds", seconds, 1e6))
        save(result)
    for batch, length in prefill:
        case: dict[str, Any] = {"batch": batch, "length": length}
        result["prefill"].append(case | _as_case(measured("prefill", prefill_call, batch, length)))
        save(result)
    for batch, context in decode:
        needed = {
            kind: step_bytes(p, result["cache_bytes_per_token"][kind], batch, context + new_tokens / 2)
            for kind, p in params.items()
        }
        case = {"batch": batch, "context": context, "new_tokens": new_tokens, "bytes": needed}
        found = measured("decode", functools.partial(decode_call, new_tokens=new_tokens), batch, context)
        result["decode"].append(case | _as_case(found))
        save(result)
    for batch, length in generate:
        case = {"batch": batch, "length": length, "new_tokens": new_tokens}
        found = measured("generate", functools.partial(generate_call, new_tokens=new_tokens), batch, length)
        result["generate"].append(case | _as_case(found))
        save(result)
    return result


def _transformers_config(config: LlamaConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def distances_from_float(model: Llama, params: Params, float_params: Params) -> dict[str, float]:
    """How far logits are from the float model's, relative Frobenius: by kernels, and by the reference implementation.

    Of the first two layers, behind two prompts and, through the cache, behind a token more of both and of the first
    alone, since a single token takes other kernels.
    """
    few = min(2, model.config.num_layers)
    small = model.clone(config=replace(model.config, num_layers=few))
    tokens, lengths = random_tokens(model.config, 2, 131), jnp.asarray([130, 77], jnp.int32)

    def logits(params: Params, implementation: str | None) -> jax.Array:
        kept = {name: leaf for name, leaf in params.items() if not name.startswith("layers_")}
        kept |= {f"layers_{i}": params[f"layers_{i}"] for i in range(few)}
        network = small.clone(implementation=implementation)
        first, cache = timed_calls.prefill(network, kept, tokens[:, :-1], lengths, 132)
        second, _ = timed_calls.decode(network, kept, tokens[:, -1:], cache)
        alone, _ = timed_calls.decode(network, kept, tokens[:1, -1:], jax.tree.map(lambda array: array[:1], cache))
        return jnp.concatenate([first, second[:, 0], alone[:, 0]])

    expected = logits(float_params, None)
    found = {"kernels": logits(params, None), "reference": logits(params, "reference")}
    return {name: float(jnp.linalg.norm(x - expected) / jnp.linalg.norm(expected)) for name, x in found.items()}


def _as_case(measured: Mapping[str, Measured]) -> dict[str, Any]:
    seconds = {kind: found.seconds for kind, found in measured.items()}
    return _by_kind("milliseconds", seconds, 1e3) | {
        "memory_bytes": {kind: found.memory_bytes for kind, found in measured.items()},
        "compile_seconds": {kind: found.compile_seconds for kind, found in measured.items()},
    }


def _by_kind(unit: str, seconds: Mapping[str, float | None], factor: float) -> dict[str, Any]:
    return {unit: {kind: None if s is None else s * factor for kind, s in seconds.items()}}

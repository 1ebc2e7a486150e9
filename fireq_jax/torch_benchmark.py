"""The Llama of transformers in torch, timed as :mod:`fireq_jax.benchmark` times this package's.

    python -m fireq_jax.torch_benchmark < request.json

reads the arguments of :func:`measure` and writes its result. A process of its own, because each framework takes the
device's memory for itself.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

CACHES = {"default": None, "static cache": "static"}  # names of ours, and of transformers


def run(config: dict[str, Any], prefill: Sequence[Any], decode: Sequence[Any], new_tokens: int) -> dict[str, Any]:
    """:func:`measure` in a process of its own.

    Raises:
      ModuleNotFoundError: torch or transformers is not installed.
      RuntimeError: the process failed.
    """
    for package in ("torch", "transformers"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"{package} is not installed; without it there is no such baseline")
    request = json.dumps({"config": config, "prefill": prefill, "decode": decode, "new_tokens": new_tokens})
    command = [sys.executable, "-m", "fireq_jax.torch_benchmark"]
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the torch baseline failed: {done.stderr.strip()[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(config: dict[str, Any], prefill: Sequence[Any], decode: Sequence[Any], new_tokens: int) -> dict[str, Any]:
    """Milliseconds of prompts, and per generated token, of a bf16 model with random weights and sdpa attention.

    Args:
      config: of transformers' ``LlamaConfig``.
      prefill: pairs of batch size and prompt length.
      decode: pairs of batch size and context length.
      new_tokens: tokens generated at each of these.

    Returns:
      Versions, and a list per kind; None stands for what the device's memory does not suffice for. Decoding is
      measured as ``generate`` runs it by default, and with a static cache, with which it compiles the model.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="sdpa")).eval()

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def milliseconds(call: Callable[[], Any], repeats: int = 3) -> float:
        found = []
        for _ in range(1 + repeats):
            wait()
            began = time.perf_counter()
            call()
            wait()
            found.append((time.perf_counter() - began) * 1e3)
        return min(found[1:])

    def unless_too_large(time_of: Callable[..., float], *arguments: Any) -> float | None:
        try:
            return time_of(*arguments)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None

    def tokens(batch: int, length: int) -> Any:
        return torch.randint(config["vocab_size"], (batch, length), device=device)

    def time_prompt(batch: int, length: int) -> float:
        prompt = tokens(batch, length)
        return milliseconds(lambda: model(prompt, use_cache=True, logits_to_keep=1))

    def time_token(batch: int, context: int, cache: str | None) -> float:
        prompt = tokens(batch, context)

        def generate(count: int) -> Any:
            settings = GenerationConfig(
                max_new_tokens=count, min_new_tokens=count, do_sample=False, cache_implementation=cache,
                pad_token_id=0, eos_token_id=None,
            )  # fmt: skip
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)

        # What prompt and set-up take is in both.
        few, many = 2, 2 + new_tokens
        return (milliseconds(lambda: generate(many), 2) - milliseconds(lambda: generate(few), 2)) / new_tokens

    result: dict[str, Any] = {
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
    with torch.inference_mode():
        result["prefill"] = [unless_too_large(time_prompt, *case) for case in prefill]
        result["decode"] = [
            {name: unless_too_large(time_token, *case, kind) for name, kind in CACHES.items()} for case in decode
        ]  # fmt: skip
    return result


if __name__ == "__main__":
    print(json.dumps(measure(**json.load(sys.stdin))))

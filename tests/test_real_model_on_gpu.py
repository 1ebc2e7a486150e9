"""The embedded model through the kernels of a Hopper GPU, beside the reference implementation on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_matmul_kernel import on_hopper

import convert
import fireq_jax

TEXTS = [
    "The capital of France is",
    "In 1969 the first human beings",
    "def fibonacci(n):\n    return",
    "Water boils at a temperature of",
    "Once upon a time, in a small village by the sea, there lived",
    "The three laws of motion were stated by Isaac Newton. The first of them says that",
    "Dear Sir or Madam,\n\nI am writing to",
    "Q: What is the largest planet of the solar system?\nA:",
]
STEPS = 32


@pytest.mark.gpu
@pytest.mark.smollm2
@on_hopper
def test_smollm2_on_a_gpu_beside_the_cpu(smollm2_tokenizer):
    """Greedy tokens agree for 32 steps, or differ first where the two best are nearer than rounding moves logits."""
    model, params = convert.load(convert.embedded_model(), dtype=jnp.bfloat16)
    quantized = fireq_jax.quantize(params)
    prompts = [smollm2_tokenizer(text)["input_ids"] for text in TEXTS]
    options = {"max_new_tokens": STEPS, "eos_token_ids": ()}
    on_gpu = fireq_jax.generate(model, fireq_jax.to_layout(quantized, "tiles"), prompts, **options).to_lists()
    reference, cpu = fireq_jax.Llama(model.config, model.dtype, "reference"), jax.devices("cpu")[0]
    rows, floats = jax.device_put((fireq_jax.to_layout(quantized, "rows"), params), cpu)
    with jax.default_device(cpu):
        on_cpu = fireq_jax.generate(reference, rows, prompts, **options).to_lists()

    length = max(map(len, prompts)) + STEPS
    length += -length % 8
    sequences = np.zeros((len(prompts), length), np.int32)
    for i, (prompt, tokens) in enumerate(zip(prompts, on_cpu, strict=True)):
        sequences[i, : len(prompt) + STEPS] = [*prompt, *tokens]

    def logits(llama, weights, kind="int4"):
        """Of all positions, every token through the cache."""
        cache = fireq_jax.KVCache.zeros(llama.config, len(prompts), length, kind)
        return np.asarray(jax.jit(llama.apply)({"params": weights}, sequences, cache=cache), np.float64)

    by_kernels = logits(model, fireq_jax.to_layout(quantized, "tiles"))
    with jax.default_device(cpu):
        by_reference, unquantized = logits(reference, rows), logits(reference, floats, "float")

    def rms(x):
        """Over the vocabulary; a constant in all logits does not count."""
        return np.sqrt(np.mean((x - x.mean(-1, keepdims=True)) ** 2, axis=-1))

    agreed = 0
    for i, (prompt, gpu, cpu_tokens) in enumerate(zip(prompts, on_gpu, on_cpu, strict=True)):
        generated = slice(len(prompt) - 1, len(prompt) - 1 + STEPS)
        rounding = rms(by_kernels[i, generated] - by_reference[i, generated])
        loss = rms(by_reference[i, generated] - unquantized[i, generated])
        differing = [step for step in range(STEPS) if gpu[step] != cpu_tokens[step]]
        first = differing[0] if differing else STEPS
        agreed += first
        gap = 0.0
        if differing:
            at = by_reference[i, len(prompt) - 1 + first]
            gap = at[cpu_tokens[first]] - at[gpu[first]]
        print(
            f"{TEXTS[i][:30]!r}: {first} steps agree, gap {gap:.3f}, rounding {rounding.mean():.3f}, "
            f"loss {loss.mean():.3f}"
        )
        # Kernels and reference round at the same places, but sums differ in their last bits; e4m3 roundings that flip
        # because of it move logits by less than all roundings together do.
        assert rounding.mean() < loss.mean()
        # Two logits that each move by that much (as normal numbers) change places over four deviations of their
        # difference once in 30000 times.
        assert gap <= 4 * np.sqrt(2) * rounding[min(first, STEPS - 1)]
    assert agreed > len(prompts) * STEPS / 4

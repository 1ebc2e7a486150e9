"""The embedded model through the kernels of a Hopper GPU, beside the reference implementation on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_oracles import on_hopper

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
    """Greedy tokens agree for 32 steps, or differ first where the two best are nearer than rounding moves logits.

    A quantised model is chaotic: a sum in another order moves an e4m3 rounding, and that the logits. How far they move
    is measured on the CPU, between activations in bf16 and in float32; the kernels may move them as far.
    """
    model, params = convert.load(convert.embedded_model(), dtype=jnp.bfloat16)
    quantized = fireq_jax.quantize(params)
    prompts = [smollm2_tokenizer(text)["input_ids"] for text in TEXTS]
    options = {"max_new_tokens": STEPS, "eos_token_ids": ()}
    on_gpu = fireq_jax.generate(model, fireq_jax.to_layout(quantized, "tiles"), prompts, **options).to_lists()
    reference, cpu = fireq_jax.Llama(model.config, model.dtype, "reference"), jax.devices("cpu")[0]
    rows = jax.device_put(fireq_jax.to_layout(quantized, "rows"), cpu)
    with jax.default_device(cpu):
        on_cpu = fireq_jax.generate(reference, rows, prompts, **options).to_lists()

    length = max(map(len, prompts)) + STEPS
    sequences = np.zeros((len(prompts), length), np.int32)
    for i, (prompt, tokens) in enumerate(zip(prompts, on_cpu, strict=True)):
        sequences[i, : len(prompt) + STEPS] = [*prompt, *tokens]

    def logits(llama, weights):
        """Of all positions, every token through the cache."""
        cache = fireq_jax.KVCache.zeros(llama.config, len(prompts), length)
        return np.asarray(jax.jit(llama.apply)({"params": weights}, sequences, cache=cache), np.float64)

    by_kernels = logits(model, fireq_jax.to_layout(quantized, "tiles"))
    with jax.default_device(cpu):
        by_reference = logits(reference, rows)
        in_float32 = logits(fireq_jax.Llama(model.config, jnp.float32, "reference"), rows)

    def rms(x):
        """Over the vocabulary; a constant in all logits does not count."""
        return np.sqrt(np.mean((x - x.mean(-1, keepdims=True)) ** 2, axis=-1))

    moved, on_the_cpu = [], []
    for i, (prompt, gpu, cpu_tokens) in enumerate(zip(prompts, on_gpu, on_cpu, strict=True)):
        generated = slice(len(prompt) - 1, len(prompt) - 1 + STEPS)
        rounding = rms(by_kernels[i, generated] - by_reference[i, generated])
        moved.append(rounding.mean())
        on_the_cpu.append(rms(by_reference[i, generated] - in_float32[i, generated]).mean())
        differing = [step for step in range(STEPS) if gpu[step] != cpu_tokens[step]]
        first = differing[0] if differing else STEPS - 1
        at = by_reference[i, len(prompt) - 1 + first]
        gap = at[cpu_tokens[first]] - at[gpu[first]]
        print(f"{TEXTS[i][:30]!r}: {first} steps agree, gap {gap:.2f}; moved {moved[-1]:.2f}, {on_the_cpu[-1]:.2f}")
        # Two logits that each move by that much (as normal numbers) change places over four deviations of their
        # difference once in 30000 times.
        assert gap <= 4 * np.sqrt(2) * rounding[first]
    # The means over 256 steps; between prompts they spread by a sixth.
    assert np.mean(moved) < 1.25 * np.mean(on_the_cpu)

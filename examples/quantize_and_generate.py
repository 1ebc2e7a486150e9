"""Quantise a model, compare it with the float one on a text, and continue two prompts in one batch.

uv run python examples/quantize_and_generate.py [folder, .gguf file or hub id]
"""

import sys

import jax

import convert
import fireq_jax
from fireq_jax.calibration_text import calibration_tokens, default_calibration_text


def main() -> None:
    source = sys.argv[1] if len(sys.argv) > 1 else convert.embedded_model()
    model, params = convert.load(source)
    tokenizer = convert.load_tokenizer(source)
    text = default_calibration_text()
    statistics = fireq_jax.calibrate(model, params, calibration_tokens(tokenizer, text, 4096))
    quantized = fireq_jax.quantize(params, calibration=statistics)

    text = "The sea is blue because water absorbs red light, and what is left over is scattered back to the eye."
    score = fireq_jax.evaluate(model, quantized, tokenizer(text)["input_ids"], reference=params)
    print(f"KL from the float model: {score.kl:.3f} nats per token over {score.scored_tokens} tokens")

    prompts = ["The three largest oceans are", "A good recipe for bread needs"]
    out = fireq_jax.generate(
        model,
        quantized,
        tokenizer(prompts)["input_ids"],
        max_new_tokens=40,
        sampling=fireq_jax.Sampling(temperature=0.7, top_p=0.9),
        key=jax.random.key(0),
    )
    for prompt, tokens in zip(prompts, out.to_lists(), strict=True):
        print(f"{prompt}{tokenizer.decode(tokens, skip_special_tokens=True)}\n")


if __name__ == "__main__":
    main()

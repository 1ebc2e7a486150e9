"""Quantises models of other sizes with random weights: how long it takes, and that nothing depends on one model.

    uv run python examples/accuracy_shapes.py

Two parts, each recorded in docs/results/shapes.json: the time that "best" takes per decoder block of Llama-3-8B's
sizes, and the divergence of recipes on a model of Llama-3.2-1B's block sizes with planted outlier channels.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pages import result_file

import fireq_jax
from fireq_jax import scaling
from fireq_jax.quantize import layer_names

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "shapes.json"
ROPE = fireq_jax.RopeConfig(theta=500000.0)
LLAMA_3_8B = fireq_jax.LlamaConfig(1024, 4096, 14336, 3, 32, 8, 128, 8192, rope=ROPE)
LLAMA_32_1B = fireq_jax.LlamaConfig(4096, 2048, 8192, 4, 32, 8, 64, 8192, rope=ROPE)
LLAMA_3_8B_LAYERS = 32
OUTLIER = 30.0  # factor of a planted channel
OUTLIERS = 0.01  # share of channels


def random_model(config: fireq_jax.LlamaConfig, dtype: Any) -> tuple[fireq_jax.Llama, dict[str, Any]]:
    model = fireq_jax.Llama(config, jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: x.astype(dtype), params)


def time_blocks(tokens: int) -> dict[str, Any]:
    """Seconds per block of calibration and of "best", compilation apart."""
    config = LLAMA_3_8B
    model, params = random_model(config, jnp.bfloat16)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, tokens)
    seconds: dict[str, float] = {}
    statistics = None
    for stage in ("calibrate", "quantize"):
        ends = [time.perf_counter()]

        def note(done: int, total: int, ends: list[float] = ends) -> None:
            ends.append(time.perf_counter())

        if stage == "calibrate":
            statistics = fireq_jax.calibrate(model, params, ids, progress=note)
        else:
            jax.block_until_ready(fireq_jax.quantize(params, "best", calibration=statistics, progress=note))
            ends.append(time.perf_counter())
        seconds[f"{stage}_first_block"] = ends[1] - ends[0]
        # Blocks are dispatched ahead of the device, so only the span over all later ones counts.
        seconds[f"{stage}_per_block"] = (ends[-1] - ends[1]) / (config.num_layers - 1)
    whole = sum(
        seconds[f"{stage}_first_block"] + (LLAMA_3_8B_LAYERS - 1) * seconds[f"{stage}_per_block"]
        for stage in ("calibrate", "quantize")
    )
    return {"tokens": tokens, "blocks": config.num_layers, **seconds, "extrapolated_32_blocks": whole}


def planted_outliers(tokens: int) -> dict[str, float]:
    """KL of recipes on random weights whose activations, keys and values got a few large channels."""
    config = LLAMA_32_1B
    model, params = random_model(config, jnp.float32)
    rng = np.random.default_rng(1)

    def factors(*shape: int) -> jax.Array:
        return jnp.asarray(np.where(rng.random(shape) < OUTLIERS, 1 / OUTLIER, 1.0), jnp.float32)

    for name in layer_names(params):
        layer = scaling.scale_attention_input(params[name], factors(config.hidden_size))
        layer = scaling.scale_mlp_input(layer, factors(config.hidden_size))
        layer = scaling.scale_mlp_hidden(layer, factors(config.intermediate_size))
        layer = scaling.scale_values(layer, factors(config.num_kv_heads, config.head_dim))
        params[name] = scaling.scale_keys_before_rope(layer, factors(config.num_kv_heads, config.head_dim // 2))
    ids = np.random.default_rng(2).integers(0, config.vocab_size, 2 * tokens)
    statistics = fireq_jax.calibrate(model, params, ids[:tokens])
    return {
        name: fireq_jax.evaluate(
            model, fireq_jax.quantize(params, name, calibration=None if name in ("rtn", "data_free") else statistics),
            ids[tokens:], reference=params,
        ).kl
        for name in ("rtn", "data_free", "fireq", "best")
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_file, default=RESULTS)
    parser.add_argument("--commit", required=True, help="to record")
    args = parser.parse_args()
    results: dict[str, Any] = {
        "command": "python examples/accuracy_shapes.py",
        "commit": args.commit,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    for name, part in (("llama_3_8b_blocks", lambda: time_blocks(8192)), ("outliers", lambda: planted_outliers(4096))):
        results[name] = part()
        print(name, results[name], flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

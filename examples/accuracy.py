"""Measures what quantisation recipes cost on the embedded model and writes docs/accuracy.md's table.

    uv run python examples/accuracy.py

The texts come with this repository and with CPython: calibration on its help topics (``pydoc_data.topics``),
evaluation on source code of the standard library, the text of the Apache licence, and a story. Raw numbers go to
docs/results.
"""

import asyncio.base_events
import json
import platform
import subprocess
import time
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jax
import numpy as np

import convert
import fireq_jax
from fireq_jax.demo import calibration_tokens, default_calibration_text

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "accuracy.json"
PAGE = ROOT / "docs" / "accuracy.md"
BEGIN, END = "<!-- table: examples/accuracy.py -->", "<!-- end of table -->"
WINDOW = 512
CALIBRATION_TOKENS = 8192
RECIPES = {
    "rtn": fireq_jax.PRESETS["rtn"],
    "fireq": fireq_jax.PRESETS["fireq"],
    "best": fireq_jax.PRESETS["best"],
    "best, float cache": fireq_jax.Recipe("best", smoothing="search", rounding="gptq", kv_cache="float"),
    "best without smoothing": fireq_jax.Recipe("best", keys="search", rounding="gptq"),
    "rtn with searched keys": fireq_jax.Recipe("rtn", keys="search"),
}


def texts() -> dict[str, str]:
    return {
        "code": Path(asyncio.base_events.__file__).read_text("utf-8")[:8000],
        "licence": (ROOT / "LICENSE").read_text("utf-8")[:7000],
        "story": files("fireq_jax").joinpath("data/passage.txt").read_text("utf-8"),
    }


def measure() -> dict[str, Any]:
    model, params = convert.load(convert.embedded_model(), dtype="float32")
    tokenizer = convert.load_tokenizer(convert.embedded_model())
    evaluation = {name: tokenizer(text)["input_ids"] for name, text in texts().items()}
    began = time.perf_counter()
    calibration = fireq_jax.calibrate(
        model, params, calibration_tokens(tokenizer, default_calibration_text(), CALIBRATION_TOKENS), window=WINDOW
    )
    seconds = {"calibrate": time.perf_counter() - began}
    rows = []
    for name, recipe in RECIPES.items():
        began = time.perf_counter()
        quantized = jax.block_until_ready(fireq_jax.quantize(params, recipe, calibration=calibration))
        seconds[name] = time.perf_counter() - began
        scores = {
            text: fireq_jax.evaluate(model, quantized, np.asarray(ids), reference=params, window=WINDOW).to_dict()
            for text, ids in evaluation.items()
        }
        rows.append({"recipe": name, "texts": scores})
        print(name, {text: round(score["kl"], 4) for text, score in scores.items()}, flush=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {
        "command": "uv run python examples/accuracy.py",
        "commit": commit.stdout.strip(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("fireq-jax", "jax", "flax", "numpy")},
        "model": "SmolLM2-135M-Instruct (GGUF Q4_1, dequantised to float32)",
        "window": WINDOW,
        "calibration_tokens": CALIBRATION_TOKENS,
        "seconds": seconds,
        "rows": rows,
    }


def average(scores: dict[str, Any], key: str) -> float:
    """Mean over all scored tokens of all texts."""
    weights = [score["scored_tokens"] for score in scores.values()]
    return float(np.average([score[key] for score in scores.values()], weights=weights))


def table(results: dict[str, Any]) -> str:
    names = list(results["rows"][0]["texts"])
    tokens = sum(score["scored_tokens"] for score in results["rows"][0]["texts"].values())
    lines = [
        f"{results['model']}, windows of {results['window']}, {tokens} scored tokens, calibration on "
        f"{results['calibration_tokens']} tokens; keys and values through the cache. KL in nats per token.",
        "",
        "| recipe | KL | top-1 agreement | " + " | ".join(f"KL, {name}" for name in names) + " | seconds |",
        "|---|---|---|" + "---|" * len(names) + "---|",
    ]
    for row in results["rows"]:
        scores = row["texts"]
        each = " | ".join(f"{scores[name]['kl']:.3f}" for name in names)
        overall = f"{average(scores, 'kl'):.3f} | {average(scores, 'top1_agreement'):.1%}"
        lines.append(f"| {row['recipe']} | {overall} | {each} | {results['seconds'][row['recipe']]:.0f} |")
    lines += ["", f"Device: {results['device']}; commit {results['commit'][:12]}; calibration took "
                  f"{results['seconds']['calibrate']:.0f} s more."]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    results = measure()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    before, rest = PAGE.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()

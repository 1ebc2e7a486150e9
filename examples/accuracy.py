"""Measures what quantisation recipes cost on the embedded model; raw numbers go to docs/results/accuracy.json.

    uv run python examples/accuracy_texts.py texts.json
    uv run python examples/accuracy.py texts.json
    uv run --group plots python examples/accuracy_report.py

Meant for a GPU, where it takes some minutes; on two CPU cores it takes hours.
"""

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from pages import result_file

import convert
import fireq_jax
from convert.folder import write_json
from fireq_jax import layers
from pallas_kernels import quantize_fp8

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "accuracy.json"
WINDOW = 1024
EVALUATED_TOKENS = 5120  # of each text
CALIBRATION_WINDOW = 512
# Tokens of each source of calibration text.
CALIBRATION_TOKENS = {"help": 8192, "library": 8192, "english": 16384}
DRAWS = 3
P = fireq_jax.PRESETS


def no_cache(recipe: fireq_jax.Recipe) -> fireq_jax.Recipe:
    return replace(recipe, kv_cache="float")


def weights_only(recipe: fireq_jax.Recipe) -> fireq_jax.Recipe:
    return replace(recipe, kv_cache="float", activations="none")


def cache_only(recipe: fireq_jax.Recipe) -> fireq_jax.Recipe:
    return replace(P["kv4"], keys=recipe.keys, values=recipe.values)


# Name, recipe, calibration draws; most wanted first, in case time runs out.
RECIPES = [
    ("rtn", P["rtn"], 1),
    ("data_free", P["data_free"], 1),
    ("fireq", P["fireq"], DRAWS),
    ("best", P["best"], DRAWS),
    ("learned", P["learned"], DRAWS),
    ("learned, not refined", replace(P["learned"], refine=False), 1),
    ("learned, no curvature", replace(P["learned"], curvature=False), 1),
    ("best: W4A8", no_cache(P["best"]), 1),
    ("best: W4", weights_only(P["best"]), 1),
    ("best: KV4", cache_only(P["best"]), 1),
    ("rtn: W4A8", no_cache(P["rtn"]), 1),
    ("rtn: W4", weights_only(P["rtn"]), 1),
    ("rtn: KV4", cache_only(P["rtn"]), 1),
    ("fireq: W4A8", no_cache(P["fireq"]), 1),
    ("fireq: W4", weights_only(P["fireq"]), 1),
    ("fireq: KV4", cache_only(P["fireq"]), 1),
    ("best, folded", replace(P["best"], numerics="folded"), 1),
    ("best, not sequential", replace(P["best"], sequential=False), 1),
    ("best, keys searched", replace(P["best"], keys="search", values="none"), 1),
    ("fireq, folded", replace(P["fireq"], numerics="folded"), 1),
    ("fireq_bf16", P["fireq_bf16"], 1),
    ("rtn, INT4 lm_head", replace(P["rtn"], lm_head="int4"), 1),
    ("best, INT4 lm_head", replace(P["best"], lm_head="int4"), 1),
    ("best, fp8 lm_head", replace(P["best"], lm_head="fp8"), 1),
    ("best, INT8 lm_head", replace(P["best"], lm_head="int8"), 1),
]


def draw(sources: dict[str, np.ndarray], seed: int) -> np.ndarray:
    """Windows spread over every source, at places that depend on the seed."""
    rng = np.random.default_rng(seed)
    windows = []
    for name, count in CALIBRATION_TOKENS.items():
        ids, n = sources[name], count // CALIBRATION_WINDOW
        starts = (np.arange(n) + rng.random(n)) * (len(ids) - CALIBRATION_WINDOW) / n
        windows += [ids[int(start) : int(start) + CALIBRATION_WINDOW] for start in starts]
    return np.concatenate(windows)


def with_rounded_inputs(params: dict[str, Any]) -> dict[str, Any]:
    """Float parameters whose linear weights are marked for :func:`fp8_inputs`."""

    def mark(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        marked = {key: mark(value) for key, value in node.items()}
        return {**marked, "rounded_input": jnp.ones(())} if "kernel" in node else marked

    return {name: mark(part) if name.startswith("layers_") else part for name, part in params.items()}


@contextmanager
def fp8_inputs() -> Iterator[None]:
    """Rounds the input of marked linear layers to e4m3 per token."""
    project = layers.project

    def rounded(x: Any, linears: Sequence[layers.Linear], residual: jax.Array | None = None) -> list[jax.Array]:
        if linears[0].has_variable("params", "rounded_input"):
            axes = tuple(range(-len(linears[0].in_shape), 0))
            codes, scale = quantize_fp8(x, axis=axes)
            x = (codes.astype(jnp.float32) * jnp.expand_dims(scale, axes)).astype(x.dtype)
        return project(x, linears, residual)

    with mock.patch.object(layers, "project", rounded):
        yield


def measure(args: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    source = args.model or convert.embedded_model()
    model, params = convert.load(source, dtype="float32")
    tokenizer = convert.load_tokenizer(source)
    texts = json.loads(args.texts.read_text("utf-8"))
    evaluation = {name: tokenizer(text)["input_ids"][:EVALUATED_TOKENS] for name, text in texts[args.evaluate].items()}
    sources = {name: np.asarray(tokenizer(text)["input_ids"]) for name, text in texts["calibration"].items()}
    rows: list[dict[str, Any]] = []

    def record(name: str, seed: int, quantized: Any, seconds: float) -> None:
        scores = {
            text: fireq_jax.evaluate(model, quantized, ids, reference=params, window=WINDOW).to_dict()
            for text, ids in evaluation.items()
        }
        rows.append({"recipe": name, "draw": seed, "seconds": seconds, "texts": scores})
        kl = np.mean([score["kl"] for score in scores.values()])
        print(f"{time.perf_counter() - began:5.0f} s  {name}, draw {seed}: KL {kl:.4f}", flush=True)

    @cache
    def calibration(seed: int) -> Any:
        return fireq_jax.calibrate(model, params, draw(sources, seed), window=CALIBRATION_WINDOW)

    for name, recipe, draws in RECIPES:
        if args.only and name not in args.only:
            continue
        for seed in range(min(draws, args.draws)):
            if time.perf_counter() - began > args.seconds:
                continue
            reads_data = recipe.needs_calibration or (recipe.keys != "none" and recipe.name != "data_free")
            statistics = calibration(seed) if reads_data else None
            start = time.perf_counter()
            quantized = jax.block_until_ready(fireq_jax.quantize(params, recipe, calibration=statistics))
            record(name, seed, quantized, time.perf_counter() - start)
    if not args.only or "A8" in args.only:
        with fp8_inputs():
            record("A8", 0, with_rounded_inputs(params), 0.0)
    return {
        "command": "python examples/accuracy.py texts.json"
        + f" --evaluate {args.evaluate}" * (args.evaluate != "evaluation")
        + f" --draws {args.draws}" * (args.draws != DRAWS)
        + "".join(f" --only {name!r}" for name in args.only or []),
        "commit": args.commit or git_commit(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("jax", "jaxlib", "flax", "numpy", "optax")},
        "model": "SmolLM2-135M-Instruct (GGUF Q4_1, dequantised to float32)",
        "window": WINDOW,
        "calibration_tokens": CALIBRATION_TOKENS,
        "calibration_window": CALIBRATION_WINDOW,
        "rows": rows,
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def git_commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, help="what accuracy_texts.py wrote")
    parser.add_argument("--model", type=Path, help="a GGUF file or a folder; the embedded model if left out")
    parser.add_argument("--out", type=result_file, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after this time")
    rows = [*(name for name, _, _ in RECIPES), "A8"]
    parser.add_argument("--only", action="append", choices=rows, help="a row to measure, not all; may be repeated")
    parser.add_argument("--evaluate", choices=("evaluation", "others"), default="evaluation", help="which texts")
    parser.add_argument("--draws", type=int, default=DRAWS, help="calibration draws of a row at most")
    parser.add_argument("--commit", help="to record, where there is no git")
    args = parser.parse_args()
    # float32 products on a GPU would otherwise run in tf32.
    with jax.default_matmul_precision("highest"):
        results = measure(args)
    write_json(args.out, results)


if __name__ == "__main__":
    main()

"""Runs every kernel on small shapes under compute-sanitizer; the verdicts go to docs/results/sanitizer.json.

python examples/sanitize_kernels.py --commit HASH
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import fireq_jax
from convert.folder import write_json
from fireq_jax.benchmark import SIZES, random_params

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "sanitizer.json"
TOOLS = ("memcheck", "racecheck", "synccheck")
# Batch sizes and prompt lengths: one sequence, whose products round a token themselves, and prompts of several tiles;
# each is continued by a token and by another prompt.
CASES = [(1, 3), (3, 150)]


def run_kernels() -> None:
    """Prompts, tokens behind them, and prompts behind those, of one layer through all kernels."""
    model = fireq_jax.Llama(replace(SIZES["toy"], num_layers=1))
    params = fireq_jax.quantize(random_params(model.config), "rtn")
    apply = jax.jit(model.apply, static_argnames=("method", "continued"))
    for batch, length in CASES:
        tokens = jax.random.randint(jax.random.key(0), (batch, length), 0, model.config.vocab_size, jnp.int32)
        lengths = jnp.arange(batch, dtype=jnp.int32) % length + 1
        cache = fireq_jax.KVCache.zeros(model.config, batch, 2 * length + 8)
        weights = {"params": params}
        logits, cache = apply(weights, tokens, lengths, cache, method="prefill")
        more, cache = apply(weights, tokens[:, :1], cache, method="decode")
        last, cache = apply(weights, tokens, lengths, cache, method="prefill", continued=True)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in (logits, more, last))


def examine(tool: str) -> dict[str, Any]:
    """Runs the kernels under one of the sanitizer's tools."""
    began = time.perf_counter()
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kernel_substring=mosaic_gpu_kernel"]
    done = subprocess.run(
        [*command, sys.executable, __file__, "--run"], capture_output=True, text=True, check=False,
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )  # fmt: skip
    lines = (done.stdout + done.stderr).splitlines()
    verdicts = [line.strip("= ") for line in lines if "SUMMARY" in line]
    if done.returncode or not verdicts:
        print(tool, *lines[-30:], sep="\n")
    return {"exit status": done.returncode, "verdicts": verdicts, "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--commit", help="to record")
    parser.add_argument("--run", action="store_true", help="run the kernels alone, as the sanitizer does")
    args = parser.parse_args()
    if args.run:
        run_kernels()
        return
    results = {
        "command": "python examples/sanitize_kernels.py",
        "commit": args.commit,
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": version("jax")},
        "cases": CASES,
        "tools": {},
    }
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        for tool, found in zip(TOOLS, pool.map(examine, TOOLS), strict=True):
            results["tools"][tool] = found
            print(tool, found)
            write_json(args.out, results)


if __name__ == "__main__":
    main()

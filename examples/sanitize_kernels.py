"""Runs every kernel on small shapes under compute-sanitizer; the verdicts go to docs/results/sanitizer.json.

python examples/sanitize_kernels.py --commit HASH
"""

import argparse
import os
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp

import fireq_jax
from convert.folder import write_json
from fireq_jax.benchmark import SIZES, random_params

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "sanitizer.json"
TOOLS = ("memcheck", "racecheck", "synccheck")
# Batch sizes and prompt lengths: one sequence (products that round a token themselves), a few, and a prompt of several
# tiles behind which a second one continues.
CASES = [(1, 3), (5, 40), (2, 300)]


def run_kernels() -> None:
    """Prompts, tokens behind them, and prompts behind those, of two layers through all kernels."""
    model = fireq_jax.Llama(SIZES["toy"])
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
    for tool in TOOLS:
        began = time.perf_counter()
        command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kernel_substring=mosaic_gpu_kernel"]
        done = subprocess.run(
            [*command, sys.executable, __file__, "--run"], capture_output=True, text=True, check=False,
            env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )  # fmt: skip
        lines = (done.stdout + done.stderr).splitlines()
        verdicts = [line.strip("= ") for line in lines if re.search(r"SUMMARY", line)]
        results["tools"][tool] = {
            "exit status": done.returncode, "verdicts": verdicts, "seconds": time.perf_counter() - began,
        }  # fmt: skip
        print(tool, results["tools"][tool], *(lines[-20:] if done.returncode or not verdicts else ()), sep="\n")
        write_json(args.out, results)


if __name__ == "__main__":
    main()

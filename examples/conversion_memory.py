"""Converts a synthetic checkpoint of a real model's shape from files to files, and measures the peak of memory.

    uv run python examples/conversion_memory.py --folder /tmp/conversion --out docs/results/conversion.json

writes 16 GB of random bf16 weights in shards to the folder, quantises them in a process of its own, removes both, and
writes a JSON file. The peak is the process's largest resident set, mapped pages of files included (VmHWM).
"""

import argparse
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np
from pages import result_file

from convert.folder import write_json
from convert.safetensors_file import write_file
from convert.shards import shard_name, write_index
from convert.tensors import TensorSpec, tensor_table
from fireq_jax import LlamaConfig, RopeConfig

SHAPES = {
    "llama-3-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, 8192, 1e-5, RopeConfig(500000.0)),
    "llama-3.2-1b": LlamaConfig(128256, 2048, 8192, 16, 32, 8, 64, 8192, 1e-5, RopeConfig(500000.0), True),
}
CONVERSION = """
import re, sys, time
import convert
began = time.perf_counter()
convert.quantize_checkpoint(*sys.argv[1:], progress=lambda done, shards: print(done, "of", shards, file=sys.stderr))
seconds = time.perf_counter() - began
print(seconds, re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def write_model(folder: Path, config: LlamaConfig) -> dict[str, int]:
    """Writes a shard per block; returns the bytes of every part of the model."""
    parts: dict[str, list[TensorSpec]] = {}
    for spec in tensor_table(config).values():
        parts.setdefault(spec.path[0], []).append(spec)
    rng = np.random.default_rng(0)
    pool = (0.02 * rng.standard_normal(1 << 24)).astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config.to_hf() | {"dtype": "bfloat16"})
    weight_map, sizes = {}, {}
    for i, (part, specs) in enumerate(parts.items()):
        arrays = {}
        for spec in specs:
            start = int(rng.integers(1 << 20))
            arrays[spec.name] = np.resize(pool[start:], math.prod(spec.stored_shape)).reshape(spec.stored_shape)
        write_file(folder / shard_name(i, len(parts)), arrays)
        weight_map |= dict.fromkeys(arrays, shard_name(i, len(parts)))
        sizes[part] = sum(x.nbytes for x in arrays.values())
    write_index(folder, weight_map, sum(sizes.values()))
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--recipe", default="data_free", help="a preset that needs no calibration")
    parser.add_argument("--folder", type=Path, required=True, help="an empty place with 1.4 times the model's size")
    parser.add_argument("--out", type=result_file, required=True)
    arguments = parser.parse_args()
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    source, target = arguments.folder / "float", arguments.folder / "int4"
    try:
        sizes = write_model(source, SHAPES[arguments.shape])
        command = [sys.executable, "-c", CONVERSION, source, target, arguments.recipe]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds, peak = ran.stdout.split()
        result = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    write_json(
        arguments.out,
        {
            "shape": arguments.shape,
            "recipe": arguments.recipe,
            "source_bytes": sum(sizes.values()),
            "largest_part_bytes": max(sizes.values()),
            "block_bytes": sizes["layers_0"],
            "result_bytes": result,
            "peak_resident_bytes": 1024 * int(peak),
            "seconds": float(seconds),
            "device": cpu[1] if cpu else platform.processor(),
            "cores": os.cpu_count(),
            "versions": {name: version(name) for name in ("fireq-jax", "jax", "safetensors")},
            "commit": commit.stdout.strip(),
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
        },
    )
    print(json.dumps(json.loads(arguments.out.read_text()), indent=2))


if __name__ == "__main__":
    main()

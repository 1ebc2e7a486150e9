"""Times of a call's kernels on a GPU, by the operation that they belong to."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# What kernels' names tell of the operation they belong to; the first that fits counts.
OPERATORS = {
    "attention": ("prefill_attention", "decode_attention", "merge_splits", "sdpa", "fmha", "flash"),
    "matmul": ("int4_mat", "nvjet", "gemm", "cutlass", "cublas", "dot"),
    "norms and roundings": ("norm_quantize", "gate_quantize", "quantize_rows"),
    "rotation and cache": ("rotate_and_append", "rotate_and_round"),
}


def kernel_times(call: Callable[[], Any], parts: int = 1) -> dict[str, Any]:
    """Microseconds of kernels by operation, and of each kernel's name; empty where no GPU runs them.

    They are those of one of the equal ``parts`` that the call consists of, on average.
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        [trace] = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        events = [
            event
            for plane in planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
    names: dict[str, dict[str, float]] = {}
    for event in events:
        entry = names.setdefault(event.name, {"count": 0, "microseconds": 0.0})
        entry["count"] += 1 / parts
        entry["microseconds"] += event.duration_ns / 1e3 / parts
    by_operator = dict.fromkeys((*OPERATORS, "other"), 0.0)
    for name, entry in names.items():
        by_operator[operator_of(name)] += entry["microseconds"]
    return {"microseconds": by_operator, "kernels": names} if names else {}


def operator_of(kernel: str) -> str:
    """The operation that a kernel of this name belongs to."""
    for operator, parts in OPERATORS.items():
        if any(part in kernel for part in parts):
            return operator
    return "other"

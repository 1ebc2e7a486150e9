"""Writes the matmul's table in docs/kernels.md from docs/results/matmul.json.

uv run python examples/matmul_report.py
"""

import json
from pathlib import Path
from typing import Any

from pages import fill

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "matmul.json"
PAGE = ROOT / "docs" / "kernels.md"


def line(row: dict[str, Any]) -> str:
    times = dict(row["microseconds"])
    ours, bf16 = times.pop("int4"), times.pop("bf16")
    fast = [us for name, us in times.items() if name.endswith("fast")]
    precise = [us for name, us in times.items() if not name.endswith("fast")]
    rate = 2 * row["m"] * row["n"] * row["k"] / ours / 1e6
    bandwidth = row["weight_bytes"] / ours / 1e6

    def ratio(others: list[float]) -> str:
        return f"{min(others) / ours:.2f}x" if others else "-"

    cells = [
        f"{row['n']}x{row['k']}", row["m"], f"{ours:.1f}", f"{rate:.0f}", f"{bandwidth:.2f}", f"{bf16 / ours:.2f}x",
        ratio(precise), ratio(fast), f"{row['error']:.1e}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def table(results: dict[str, Any]) -> str:
    header = (
        "| n x k | tokens | us | TFLOP/s | weights TB/s | speed to bf16 | to fp8 | to fp8, fast accumulation | error |"
    )
    return "\n".join([header, "|" + "---|" * 9, *map(line, results["rows"])])


def main() -> None:
    results = json.loads(RESULTS.read_text("utf-8"))
    note = f" {results['note']}" if "note" in results else ""
    text = (
        f"{results['device']}, JAX {results['versions']['jax']}, torch {results['versions']['torch']}, commit "
        f'{results["commit"]}: `{results["command"]}`.{note} "fp8" is the faster of cuBLASLt\'s per-tensor and per-row '
        f"products. The error is the relative Frobenius norm to the float32 product.\n\n{table(results)}"
    )
    fill(PAGE, "matmul", text)


if __name__ == "__main__":
    main()

"""Writes the matmul's table in docs/kernels.md and its plot from docs/results/matmul.json.

uv run --group plots python examples/matmul_report.py
"""

import json
from pathlib import Path
from typing import Any

from pages import fill, pyplot, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "matmul.json"
PAGE = ROOT / "docs" / "kernels.md"
PLOT = ROOT / "docs" / "matmul.svg"
# Of an H100 SXM by its data sheet, fp8 without sparsity: what the memory does not bound, this does.
PEAK_TFLOPS = 1979


def cells(row: dict[str, Any]) -> list[str]:
    times = dict(row["microseconds"])
    ours, bf16 = times.pop("int4"), times.pop("bf16")
    humming = [times.pop(name) for name in ("humming",) if name in times]
    fast = [us for name, us in times.items() if name.endswith("fast")]
    precise = [us for name, us in times.items() if not name.endswith("fast")]
    rate = 2 * row["m"] * row["n"] * row["k"] / ours / 1e6
    bandwidth = row["weight_bytes"] / ours / 1e6

    def ratio(others: list[float]) -> str:
        return f"{min(others) / ours:.2f}x" if others else "-"

    return [
        f"{row['n']}x{row['k']}", str(row["m"]), f"{ours:.1f}", f"{rate:.0f}", f"{bandwidth:.2f}",
        f"{bf16 / ours:.2f}x", ratio(precise), ratio(fast), ratio(humming), f"{row['error']:.1e}",
    ]  # fmt: skip


def draw(results: dict[str, Any]) -> None:
    """TFLOP/s over tokens, a panel per shape, beside cuBLASLt and the roofline."""
    shapes = sorted({(row["n"], row["k"]) for row in results["rows"]}, reverse=True)
    figure, axes = pyplot().subplots(
        1, len(shapes), figsize=(1 + 4 * len(shapes), 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis, (n, k) in zip(axes[0], shapes, strict=True):
        rows = [row for row in results["rows"] if (row["n"], row["k"]) == (n, k)]

        def plot(label: str, points: list[tuple[int, float]], axis: Any = axis, **style: Any) -> None:
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=label, **style)

        def rate(row: dict[str, Any], us: float) -> float:
            return 2 * row["m"] * row["n"] * row["k"] / us / 1e6

        plot("INT4 x FP8", [(row["m"], rate(row, row["microseconds"]["int4"])) for row in rows])
        eights = [(row, [us for name, us in row["microseconds"].items() if name.startswith("fp8")]) for row in rows]
        plot("fp8, the fastest", [(row["m"], rate(row, min(times))) for row, times in eights if times])
        of_humming = [(row, row["microseconds"].get("humming")) for row in rows]
        plot("humming-kernels", [(row["m"], rate(row, us)) for row, us in of_humming if us])
        plot("bf16", [(row["m"], rate(row, row["microseconds"]["bf16"])) for row in rows])
        copied = [(row, row["weight_bytes"] / results["copy_bytes_per_second"] * 1e6) for row in rows]
        roofline = [(row["m"], min(PEAK_TFLOPS, rate(row, us))) for row, us in copied]
        plot("roofline of INT4 weights", roofline, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(f"{n} x {k}")
        axis.set_xlabel("tokens")
    axes[0][0].set_ylabel("TFLOP/s")
    axes[0][0].legend(fontsize="small")
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    results = json.loads(RESULTS.read_text("utf-8"))
    header = ["n x k", "tokens", "us", "TFLOP/s", "weights TB/s", "speed to bf16", "to fp8"]
    header += ["to fp8, fast accumulation", "to humming", "error"]
    note = f" {results['note']}" if "note" in results else ""
    text = (
        f"{results['device']}, JAX {results['versions']['jax']}, torch {results['versions']['torch']}, commit "
        f'{results["commit"]}: `{results["command"]}`.{note} "fp8" is the faster of cuBLASLt\'s per-tensor and per-row '
        f'products, "humming" the W4A8 product of humming-kernels {results.get("humming-kernels", "(not measured)")}. '
        "The error is the relative Frobenius norm to the float32 product.\n\n"
        f"{table(header, list(map(cells, results['rows'])))}\n\n"
        "![TFLOP/s over tokens](matmul.svg)"
    )
    fill(PAGE, "matmul", text)
    draw(results)


if __name__ == "__main__":
    main()

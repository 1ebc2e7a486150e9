"""Writes the matmul's table in docs/kernels.md, its plot and the README's summary from docs/results/matmul-*.json.

uv run --group plots python examples/matmul_report.py
"""

from pathlib import Path
from typing import Any

from pages import fill, of_devices, pyplot, table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "kernels.md"
README = ROOT / "README.md"
PLOT = ROOT / "docs" / "matmul.svg"
# Of an H100 or H200 (SXM) by its data sheet, fp8 without sparsity: what the memory does not bound, this does.
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


def draw(everything: list[dict[str, Any]]) -> None:
    """TFLOP/s over tokens, a line of panels for each device."""
    shapes = sorted({(row["n"], row["k"]) for results in everything for row in results["rows"]}, reverse=True)
    size = (1 + 4 * len(shapes), 3.6 * len(everything))
    figure, axes = pyplot().subplots(
        len(everything), len(shapes), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for results, panels in zip(everything, axes, strict=True):
        draw_device(results, shapes, panels)
    figure.savefig(PLOT, metadata={"Date": None})


def draw_device(results: dict[str, Any], shapes: list[tuple[int, int]], axes: Any) -> None:
    """A panel per shape, beside cuBLASLt and the roofline."""
    for axis, (n, k) in zip(axes, shapes, strict=True):
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
    axes[0].set_ylabel(f"TFLOP/s, {results['device']}")
    axes[0].legend(fontsize="small")


def of_device(results: dict[str, Any]) -> str:
    header = ["n x k", "tokens", "us", "TFLOP/s", "weights TB/s", "speed to bf16", "to fp8"]
    header += ["to fp8, fast accumulation", "to humming", "error"]
    note = f" {results['note']}" if "note" in results else ""
    return (
        f"{results['device']}, JAX {results['versions']['jax']}, torch {results['versions']['torch']}, commit "
        f"{results['commit']}: `{results['command']}`.{note} humming-kernels "
        f"{results.get('humming-kernels', 'was not measured')}.\n\n{table(header, list(map(cells, results['rows'])))}"
    )


def summary(everything: list[dict[str, Any]]) -> str:
    """Of each number of tokens the slowest and the fastest of the shapes, beside others' kernels."""
    others = {"bf16": "bf16", "fp8": "cuBLASLt fp8", "humming": "humming-kernels"}
    header = ["tokens"] + [f"{results['device']}, to {name}" for results in everything for name in others.values()]

    def ratios(results: dict[str, Any], m: int, kernel: str) -> str:
        found = [
            min(theirs) / row["microseconds"]["int4"]
            for row in results["rows"]
            if row["m"] == m and (theirs := [us for name, us in row["microseconds"].items() if name.startswith(kernel)])
        ]
        return f"{min(found):.2f}x to {max(found):.2f}x" if found else "-"

    tokens = sorted({row["m"] for results in everything for row in results["rows"]})
    rows = [[str(m), *(ratios(results, m, kernel) for results in everything for kernel in others)] for m in tokens]
    return table(header, rows)


def main() -> None:
    everything = of_devices("matmul")
    about = (
        '"fp8" is the faster of cuBLASLt\'s per-tensor and per-row products, "humming" the W4A8 product of '
        "humming-kernels. The error is the relative Frobenius norm to the float32 product."
    )
    parts = [about, *map(of_device, everything), "![TFLOP/s over tokens](matmul.svg)"]
    fill(PAGE, "matmul", "\n\n".join(parts))
    fill(README, "matmul", summary(everything))
    draw(everything)


if __name__ == "__main__":
    main()

"""Writes attention's tables in docs/kernels.md and its plot from docs/results/attention.json.

uv run --group plots python examples/attention_report.py
"""

import json
from pathlib import Path
from typing import Any

from pages import fill, pyplot, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "attention.json"
PAGE = ROOT / "docs" / "kernels.md"
PLOT = ROOT / "docs" / "attention.svg"


def heads(row: dict[str, Any]) -> str:
    return f"{row['query']} on {row['kv']} of {row['size']}"


def ratio(times: dict[str, float], other: str) -> str:
    return f"{times[other] / times['fireq']:.2f}x" if other in times else "-"


def flops(row: dict[str, Any]) -> float:
    """Of causal attention: two products, half of the pairs of tokens."""
    tokens = row["tokens"]
    return 2 * 2 * row["batch"] * row["query"] * row["size"] * tokens * (tokens + 1) / 2


def prompts_table(results: dict[str, Any]) -> str:
    rows = []
    for row in results["prompts"]:
        times, errors = row["microseconds"], row["errors"]
        before = row["rounding_bytes"] / results["copy_bytes_per_second"] * 1e6
        cells = [
            f"{row['batch']} x {row['tokens']}", heads(row), f"{times['fireq']:.1f}",
            f"{flops(row) / times['fireq'] / 1e6:.0f}", ratio(times, "cudnn bf16"), ratio(times, "cudnn fp8"),
        ]  # fmt: skip
        for name in ("fireq", "cudnn fp8"):
            found = errors.get(name)
            cells.append(f"{found['overall']:.3f} ({found['worst_row']:.2f})" if found else "-")
        cells += [f"{times['rotate and round']:.1f}", f"{times['rotate and round'] / before:.2f}"]
        rows.append(cells)
    header = ["batch x tokens", "heads", "us", "TFLOP/s", "speed to cuDNN bf16", "to cuDNN fp8", "distance (worst row)"]
    header += ["distance of cuDNN fp8", "rotate and round, us", "of its bytes' time"]
    return table(header, rows)


def decoding_table(results: dict[str, Any]) -> str:
    rows = []
    for row in results["decoding"]:
        times = row["microseconds"]
        rate = row["int4_bytes"] / times["fireq"] * 1e6
        cells = [f"{row['batch']} x {row['slots']}", heads(row), f"{times['fireq']:.1f}", f"{rate / 1e12:.2f}"]
        cells += [f"{rate / results['copy_bytes_per_second']:.0%}", ratio(times, "cudnn bf16")]
        rows.append([*cells, f"{row['errors']['fireq']['overall']:.1e}"])
    header = ["batch x context", "heads", "us", "INT4 bytes, TB/s", "of copy bandwidth", "speed to cuDNN bf16"]
    return table([*header, "distance"], rows)


def draw(results: dict[str, Any]) -> None:
    """TFLOP/s of prompts and speed of decoding, for the heads of Llama-3-8B."""
    figure, axes = pyplot().subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for batch, style in ((1, "-"), (16, "--")):
        rows = [r for r in results["prompts"] if (r["batch"], r["kv"], r["size"]) == (batch, 8, 128)]
        for name in ("fireq", "cudnn fp8", "cudnn bf16"):
            points = [
                (r["tokens"], flops(r) / r["microseconds"][name] / 1e6) for r in rows if name in r["microseconds"]
            ]
            color = {"fireq": "C0", "cudnn fp8": "C1", "cudnn bf16": "C2"}[name]
            if points:
                axes[0].plot(*zip(*points, strict=True), style, marker=".", color=color, label=f"{name}, batch {batch}")
    axes[0].set_xscale("log", base=2)
    axes[0].set_xlabel("tokens")
    axes[0].set_ylabel("TFLOP/s of causal attention")
    axes[0].legend(fontsize="small")
    rows = [r for r in results["decoding"] if "cudnn bf16" in r["microseconds"]]
    names = [f"{r['batch']} x {r['slots']}, {heads(r)}" for r in rows]
    axes[1].barh(names, [r["microseconds"]["cudnn bf16"] / r["microseconds"]["fireq"] for r in rows])
    axes[1].axvline(1, color="black", linewidth=0.8)
    axes[1].invert_yaxis()
    axes[1].set_xlabel("decoding, speed to cuDNN bf16")
    figure.savefig(PLOT, metadata={"Date": None})


def main() -> None:
    results = json.loads(RESULTS.read_text("utf-8"))
    origin = (
        f"{results['device']}, JAX {results['versions']['jax']}, commit {results['commit']}: `{results['command']}`. "
        f"Copy bandwidth {results['copy_bytes_per_second'] / 1e12:.2f} TB/s."
    )
    prompts = (
        f"{origin} Distances are relative Frobenius norms to float32 attention of the unrounded inputs, of the first "
        f"sequence; cuDNN in fp8 has a scale per tensor.\n\n{prompts_table(results)}\n\n![Attention](attention.svg)"
    )
    fill(PAGE, "prefill-attention", prompts)
    decoding = f"{origin} Distances are to float32 attention of the same int4 cache.\n\n{decoding_table(results)}"
    fill(PAGE, "decode-attention", decoding)
    draw(results)


if __name__ == "__main__":
    main()

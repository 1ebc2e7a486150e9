"""Writes attention's tables in docs/kernels.md and its plot from docs/results/attention-*.json.

uv run --group plots python examples/attention_report.py
"""

from pathlib import Path
from typing import Any

from pages import fill, of_devices, pyplot, table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "kernels.md"
PLOT = ROOT / "docs" / "attention.svg"
BEFORE = ("rotate and round", "rotate, scale and round", "rotate, scale, mix and round")  # the kernel before attention


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
        of_bytes = row["rounding_bytes"] / results["copy_bytes_per_second"] * 1e6
        cells = [
            f"{row['batch']} x {row['tokens']}", heads(row), f"{times['fireq']:.1f}",
            f"{flops(row) / times['fireq'] / 1e6:.0f}", ratio(times, "cudnn bf16"), ratio(times, "cudnn fp8"),
        ]  # fmt: skip
        for name in ("fireq", "cudnn fp8"):
            found = errors.get(name)
            cells.append(f"{found['overall']:.3f} ({found['worst_row']:.2f})" if found else "-")
        for name in BEFORE:
            cells.append(f"{times[name]:.1f} ({times[name] / of_bytes:.2f})" if name in times else "-")
        rows.append(cells)
    header = ["batch x tokens", "heads", "us", "TFLOP/s", "speed to cuDNN bf16", "to cuDNN fp8", "distance (worst row)"]
    header += ["distance of cuDNN fp8", *(f"{name}, us (of its bytes' time)" for name in BEFORE)]
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


def draw(everything: list[dict[str, Any]]) -> None:
    """TFLOP/s of prompts and speed of decoding, a line of panels for each device."""
    size = (10, 3.6 * len(everything))
    figure, axes = pyplot().subplots(len(everything), 2, figsize=size, layout="constrained", squeeze=False)
    for results, panels in zip(everything, axes, strict=True):
        draw_device(results, panels)
    figure.savefig(PLOT, metadata={"Date": None})


def draw_device(results: dict[str, Any], axes: Any) -> None:
    """Two panels: prompts for the heads of Llama-3-8B, and decoding."""
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
    axes[0].set_ylabel(f"TFLOP/s of causal attention, {results['device']}")
    axes[0].legend(fontsize="small")
    rows = [r for r in results["decoding"] if "cudnn bf16" in r["microseconds"]]
    names = [f"{r['batch']} x {r['slots']}, {heads(r)}" for r in rows]
    axes[1].barh(names, [r["microseconds"]["cudnn bf16"] / r["microseconds"]["fireq"] for r in rows])
    axes[1].axvline(1, color="black", linewidth=0.8)
    axes[1].invert_yaxis()
    axes[1].set_xlabel("decoding, speed to cuDNN bf16")


def origin(results: dict[str, Any]) -> str:
    return (
        f"{results['device']}, JAX {results['versions']['jax']}, commit {results['commit']}: `{results['command']}`. "
        f"Copy bandwidth {results['copy_bytes_per_second'] / 1e12:.2f} TB/s."
    )


def main() -> None:
    everything = of_devices("attention")
    prompts = [f"{origin(results)}\n\n{prompts_table(results)}" for results in everything]
    about = (
        "Distances are relative Frobenius norms to float32 attention of the unrounded inputs, of the first sequence; "
        "cuDNN in fp8 has a scale per tensor."
    )
    fill(PAGE, "prefill-attention", "\n\n".join([about, *prompts, "![Attention](attention.svg)"]))
    decoding = [f"{origin(results)}\n\n{decoding_table(results)}" for results in everything]
    about = "Distances are to float32 attention of the same int4 cache."
    fill(PAGE, "decode-attention", "\n\n".join([about, *decoding]))
    draw(everything)


if __name__ == "__main__":
    main()

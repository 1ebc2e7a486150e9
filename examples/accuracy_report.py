"""Turns what docs/results has on accuracy into the tables of docs/accuracy.md and README.md and the plot.

uv run --group plots python examples/accuracy_report.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from pages import fill

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "accuracy.md"
PLOT = ROOT / "docs" / "accuracy.svg"
README = ROOT / "README.md"
RECIPES = ("rtn", "data_free", "fireq", "best", "learned")
COMPONENTS = ("W4", "A8", "KV4", "W4A8", "all")
COMPARED = ("rtn", "fireq", "best")  # recipes whose parts are plotted


def scores(results: dict[str, Any], recipe: str, key: str) -> np.ndarray:
    """A recipe's average over all scored tokens, one value per calibration draw."""
    values = []
    for row in results["rows"]:
        if row["recipe"] == recipe:
            texts = row["texts"].values()
            values.append(np.average([t[key] for t in texts], weights=[t["scored_tokens"] for t in texts]))
    return np.asarray(values)


def per_text(results: dict[str, Any], recipe: str, text: str) -> float:
    return float(np.mean([row["texts"][text]["kl"] for row in results["rows"] if row["recipe"] == recipe]))


def spread(values: np.ndarray, digits: int = 3) -> str:
    if len(values) == 1 or values.max() == values.min():
        return f"{values[0]:.{digits}f}"
    return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f}, {len(values)} draws)"


def perplexity(results: dict[str, Any], recipe: str, key: str = "perplexity") -> float:
    """Exp of the mean loss over all texts and draws."""
    losses = [
        (np.log(text[key]), text["scored_tokens"])
        for row in results["rows"]
        if row["recipe"] == recipe
        for text in row["texts"].values()
    ]
    return float(np.exp(np.average([loss for loss, _ in losses], weights=[tokens for _, tokens in losses])))


def recipes_table(results: dict[str, Any]) -> str:
    first = results["rows"][0]["texts"]
    tokens = sum(text["scored_tokens"] for text in first.values())
    calibration = ", ".join(f"{count} of {name}" for name, count in results["calibration_tokens"].items())
    return "\n".join(
        [
            f"{results['model']}; perplexity of the float model "
            f"{perplexity(results, 'rtn', 'reference_perplexity'):.2f}. "
            f"{tokens} scored tokens in windows of {results['window']}, keys and values through the cache; calibration "
            f"on {sum(results['calibration_tokens'].values())} tokens ({calibration}). KL(float || quantised) in nats "
            f"per token. Seconds are those of `quantize` on {results['device']}, mean of the draws, with compilation "
            "where it happened.",
            "",
            *rows_of_table(results),
        ]
    )


def rows_of_table(results: dict[str, Any]) -> list[str]:
    texts = results["rows"][0]["texts"]
    lines = [
        "| recipe | KL | perplexity | top-1 agreement | " + " | ".join(texts) + " | seconds |",
        "|---|---|---|---|" + "---|" * len(texts) + "---|",
    ]
    for name in dict.fromkeys(row["recipe"] for row in results["rows"]):
        each = " | ".join(f"{per_text(results, name, text):.3f}" for text in texts)
        seconds = np.mean([row["seconds"] for row in results["rows"] if row["recipe"] == name])
        agreement = scores(results, name, "top1_agreement").mean()
        lines.append(
            f"| {name} | {spread(scores(results, name, 'kl'))} | {perplexity(results, name):.2f} | {agreement:.1%} | "
            f"{each} | {seconds:.0f} |"
        )
    return [*lines, "", f"Measured at commit {results['commit'][:12]}, JAX {results['versions']['jax']}."]


def heads_table(found: dict[str, dict[str, Any]]) -> str:
    """KL of `best` by how the output projection is kept, and with a float one where the same run has it."""
    rows = {
        "lm-head-int8": ("INT8", "best, INT8 lm_head"),
        "lm-head-fp8": ("fp8", "best, fp8 lm_head"),
        "lm-head": ("INT4", "best, lm_head"),
    }
    lines = ["| output projection | KL | with a float one | results, commit |", "|---|---|---|---|"]
    for file, (kind, name) in rows.items():
        results = found[file]
        kl, beside = (scores(results, row, "kl") for row in (name, "best"))
        shown = f"{beside[0]:.4f}" if len(beside) else "-"
        lines.append(f"| {kind} | {kl[0]:.4f} | {shown} | `{file}.json`, {results['commit'][:7]} |")
    return "\n".join(lines)


def shapes_table(results: dict[str, Any]) -> str:
    blocks = results["llama_3_8b_blocks"]
    text = (
        f"Blocks of Llama-3-8B's sizes with random weights, {blocks['tokens']} calibration tokens, on "
        f"{results['device']}: calibration {blocks['calibrate_per_block']:.1f} s and `best` "
        f"{blocks['quantize_per_block']:.1f} s per block behind the first ({blocks['calibrate_first_block']:.0f} s and "
        f"{blocks['quantize_first_block']:.0f} s with compilation), so that 32 blocks would take "
        f"{blocks['extrapolated_32_blocks'] / 60:.1f} minutes."
    )
    if "outliers" in results:
        found = ", ".join(f"{name} {value:.4f}" for name, value in results["outliers"].items())
        text += f"\n\nKL on a random model of Llama-3.2-1B's block sizes with planted outlier channels: {found}."
    return f"{text} Commit {results['commit'][:12]}."


def readme_table(results: dict[str, Any]) -> str:
    lines = ["| recipe | needs data | KL to the float model | top-1 agreement |", "|---|---|---|---|"]
    for name, data in (
        ("rtn", "no"),
        ("data_free", "no"),
        ("fireq", "yes"),
        ("best", "yes"),
        ("learned", "yes, and gradients"),
    ):
        kl, agreement = (scores(results, name, key).mean() for key in ("kl", "top1_agreement"))
        lines.append(f"| `{name}` | {data} | {kl:.3f} | {agreement:.1%} |")
    return "\n".join(lines)


def draw_plot(results: dict[str, Any]) -> None:
    mpl.rcParams["svg.hashsalt"] = "fireq-jax"  # the same numbers give the same file
    names = [name for name in RECIPES if len(scores(results, name, "kl"))]
    texts = list(results["rows"][0]["texts"])
    parts = [part for part in COMPONENTS if all(len(scores(results, part_row(name, part), "kl")) for name in COMPARED)]
    figure, axes = plt.subplots(1, 2 if parts else 1, figsize=(10 if parts else 7, 3.5), layout="constrained")
    bars(
        np.atleast_1d(axes)[0],
        {name: [per_text(results, name, text) for text in texts] for name in names},
        texts,
        "W4A8KV4 by text",
    )
    if parts:
        by_part = {name: [scores(results, part_row(name, part), "kl").mean() for part in parts] for name in COMPARED}
        bars(axes[1], by_part, parts, "by part")
    figure.savefig(PLOT, metadata={"Date": None})


def part_row(recipe: str, part: str) -> str:
    return {"all": recipe, "A8": "A8"}.get(part, f"{recipe}: {part}")


def bars(axis: Any, values: dict[str, list[float]], labels: list[str], title: str) -> None:
    width = 0.8 / len(values)
    for i, (name, heights) in enumerate(values.items()):
        axis.bar(np.arange(len(labels)) + (i - (len(values) - 1) / 2) * width, heights, 0.9 * width, label=name)
    axis.set_xticks(range(len(labels)), labels)
    axis.set_ylabel("KL to the float model\n(nats per token)")
    axis.set_title(title)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    accuracy = json.loads((RESULTS / "accuracy.json").read_text("utf-8"))
    shapes = json.loads((RESULTS / "shapes.json").read_text("utf-8"))
    fill(PAGE, "recipes", recipes_table(accuracy))
    others = json.loads((RESULTS / "accuracy-other-texts.json").read_text("utf-8"))
    of_float = perplexity(others, "rtn", "reference_perplexity")
    device = "two CPU cores" if others["device"] == "cpu" else others["device"]
    above = f"Perplexity of the float model {of_float:.2f}; on {device}."
    fill(PAGE, "other-texts", "\n".join([above, "", *rows_of_table(others)]))
    fill(PAGE, "shapes", shapes_table(shapes))
    heads = {path.stem: json.loads(path.read_text("utf-8")) for path in RESULTS.glob("lm-head*.json")}
    fill(PAGE, "output-projection", heads_table(heads))
    fill(README, "accuracy", readme_table(accuracy))
    draw_plot(accuracy)


if __name__ == "__main__":
    main()

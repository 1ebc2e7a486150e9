"""Writes the conversion's table in docs/checkpoints.md from docs/results/conversion.json.

uv run python examples/conversion_report.py
"""

import json
from pathlib import Path

from pages import fill

ROOT = Path(__file__).parents[1]


def main() -> None:
    results = json.loads((ROOT / "docs" / "results" / "conversion.json").read_text("utf-8"))
    rows = {
        "float checkpoint": f"{results['source_bytes'] / 1e9:.2f} GB",
        "largest part (the embedding)": f"{results['largest_part_bytes'] / 1e9:.2f} GB",
        "a decoder block": f"{results['block_bytes'] / 1e9:.2f} GB",
        "quantised checkpoint": f"{results['result_bytes'] / 1e9:.2f} GB",
        "**peak resident memory**": f"**{results['peak_resident_bytes'] / 1e9:.2f} GB**",
        "time": f"{results['seconds']:.0f} s",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    text = (
        f"{results['shape']}, random bf16 weights, recipe `{results['recipe']}`, {results['cores']} cores of "
        f"{results['device']}, JAX {results['versions']['jax']}, commit {results['commit']}:\n"
        f"`{results['command']}`.\n\n| | |\n|---|---|\n{table}"
    )
    fill(ROOT / "docs" / "checkpoints.md", "conversion", text)


if __name__ == "__main__":
    main()

"""Makes of what tune_matmul.py measured (docs/results/tuning-*.json) the tables that the kernels read.

uv run python examples/tuning_report.py
"""

from typing import Any

from pages import RESULTS, of_devices

from convert.folder import write_json
from pallas_kernels.tuned import TABLES, device_name

CLEARLY = 0.98  # of the time that the rules' choice takes: less than that is no noise


def fastest(tried: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest cut, or the rules' own, the first one, unless another is clearly faster; without its measurements."""
    best = min(tried, key=lambda row: row["microseconds"])
    if best["microseconds"] > CLEARLY * tried[0]["microseconds"]:
        best = tried[0]
    return {name: value for name, value in best.items() if name not in ("microseconds", "error")}


def tuning_table(results: dict[str, Any], source: str) -> dict[str, Any]:
    """A device's table."""
    measured = {name: results[name] for name in ("command", "commit", "device", "versions")} | {"in": source}
    return {"measured": measured, "classes": [fastest(product["tried"]) for product in results["products"]]}


def main() -> None:
    TABLES.mkdir(exist_ok=True)
    for results in of_devices("tuning"):
        device = device_name(results["device"])
        source = RESULTS / f"tuning-{device}.json"
        write_json(TABLES / f"{device}.json", tuning_table(results, f"docs/results/{source.name}"))


if __name__ == "__main__":
    main()

"""Makes of what tune_matmul.py measured (docs/results/tuning-*.json) the tables that the kernels read.

uv run python examples/tuning_report.py
"""

from typing import Any

from pages import RESULTS, of_devices

from convert.folder import write_json
from pallas_kernels.rules import cut_by_rule
from pallas_kernels.tuned import TABLES, device_name, of_class

CLEARLY = 0.98  # of the time that the rules' choice takes: less than that is no noise


def fastest(tried: list[dict[str, Any]]) -> dict[str, Any]:
    """The fastest cut, or what the rules choose unless another is clearly faster; without its measurements."""
    best = min(tried, key=lambda row: row["microseconds"])
    (n, k, share), m, _ = of_class(best)
    by_rule = cut_by_rule(m, n, k, share)
    own = next((row for row in tried if of_class(row)[2] == by_rule), best)
    if best["microseconds"] > CLEARLY * own["microseconds"]:
        best = own
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

"""Generated parts of hand-written pages."""

import argparse
import json
from pathlib import Path
from typing import Any

from convert.folder import write_text
from pallas_kernels.tuned import device_name

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def result_file(path: str) -> Path:
    """An argument that names a file to write when all is measured: a folder is refused before anything is."""
    if Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; name a file in it")
    return Path(path)


def of_devices(name: str) -> list[dict[str, Any]]:
    """What a benchmark of that name measured, a device each: of ``name-h100.json``, ``name-h200.json`` ..."""
    stored = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob(f"{name}-*.json"))}
    return [found for stem, found in stored.items() if stem == f"{name}-{device_name(found.get('device', ''))}"]


def fill(page: Path, marker: str, text: str) -> None:
    """Replaces what a page has between ``<!-- marker -->`` and ``<!-- end of marker -->``."""
    begin, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
    before, rest = page.read_text("utf-8").split(begin)
    write_text(page, f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def pyplot() -> Any:
    import matplotlib as mpl  # the tables need no plot
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "fireq-jax"  # the same numbers give the same file
    return plt

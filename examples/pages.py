"""Generated parts of hand-written pages."""

from pathlib import Path
from typing import Any

from convert.folder import write_text


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

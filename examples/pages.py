"""Generated parts of hand-written pages."""

from pathlib import Path

from convert.folder import write_text


def fill(page: Path, marker: str, text: str) -> None:
    """Replaces what a page has between ``<!-- marker -->`` and ``<!-- end of marker -->``."""
    begin, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
    before, rest = page.read_text("utf-8").split(begin)
    write_text(page, f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")

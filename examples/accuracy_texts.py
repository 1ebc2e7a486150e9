"""Fetches the texts that accuracy is measured on and writes them to one JSON file.

    uv run python examples/accuracy_texts.py texts.json

Needs a Debian system (tried on version 12) whose ``apt-get`` reaches an archive. Evaluation and calibration have no
source in common.
"""

import argparse
import gzip
import importlib
import inspect
import json
import re
import struct
import subprocess
import tempfile
import zlib
from html.parser import HTMLParser
from pathlib import Path

from convert.folder import write_text
from fireq_jax.calibration_text import default_calibration_text

# Debian package, file inside it. Austen's novels are in the public domain, and so is the Jargon File; the FAQ and
# Dasher's training text are under the GPL.
NOVELS = "r-cran-janeaustenr", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
JARGON = "jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz"
MANUAL = "debian-faq", "usr/share/doc/debian/FAQ/debian-faq.en.txt.gz"
ENGLISH = "dasher-data", "usr/share/dasher/training_english_GB.txt"
# BSD-licensed source code.
CODE = "python3-click", "usr/lib/python3/dist-packages/click/core.py"
# Texts that no choice was made by: rules and an essay (GPL), quotations (short passages of many authors), and
# BSD-licensed code.
RULES = "debian-policy", "usr/share/doc/debian-policy/policy.txt.gz"
ESSAY = "anarchism", "usr/share/doc/anarchism/html/secF3.html"
QUOTATIONS = "fortunes", "usr/share/games/fortunes/wisdom"
OTHER_CODE = "python3-jinja2", "usr/lib/python3/dist-packages/jinja2/compiler.py"
# Source code of CPython's standard library.
LIBRARY = ("argparse", "statistics", "asyncio.base_events", "json.decoder", "textwrap", "heapq", "email.message",
           "difflib")  # fmt: skip
CHARACTERS = 60000


def debian_file(package: str, path: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", package], cwd=folder, check=True, capture_output=True)
        (archive,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg", "-x", archive, folder], check=True)
        return (Path(folder) / path).read_bytes()


def longest_r_text(database: bytes) -> str:
    """The longest vector of strings in an R lazy-load database: chunks of a length and a zlib stream."""
    texts, position = [], 0
    while position < len(database):
        stream = zlib.decompressobj()
        chunk = stream.decompress(database[position + 4 :])
        position = len(database) - len(stream.unused_data)
        # R serialises a string as type 9 with flags, a length, and the bytes.
        lines = []
        for found in re.finditer(rb"\x00[\x00-\xff]\x00\x09(.{4})", chunk, re.DOTALL):
            (length,) = struct.unpack(">I", found.group(1))
            if length < 400:
                lines.append(chunk[found.end() : found.end() + length].decode("utf-8", "replace"))
        texts.append("\n".join(lines))
    return max(texts, key=len)


def unwrapped(text: str) -> str:
    """Lines joined into paragraphs."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text)


class Prose(HTMLParser):
    """The text of a page, in the end."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def handle_data(self, data: str) -> None:
        """Takes what lies between two tags."""
        self.text += data


def without_tags(page: str) -> str:
    """The paragraphs of an HTML page, a line each."""
    prose = Prose()
    prose.feed(re.sub(r"\s+", " ", page).replace("<p>", "\n\n<p>"))
    return prose.text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="the file to write")
    target = parser.parse_args().target
    novel = unwrapped(longest_r_text(debian_file(*NOVELS)))
    jargon = gzip.decompress(debian_file(*JARGON)).decode("utf-8", "replace")
    manual = gzip.decompress(debian_file(*MANUAL)).decode()
    library = [inspect.getsource(importlib.import_module(name)) for name in LIBRARY]
    texts = {
        "evaluation": {
            "novel": novel[200_000:][:CHARACTERS],
            "lexicon": jargon[700_000:][:CHARACTERS],
            "manual": manual[30_000:][:CHARACTERS],
            "code": debian_file(*CODE).decode()[20_000:][:CHARACTERS],
        },
        "others": {
            "rules": gzip.decompress(debian_file(*RULES)).decode()[60_000:][:CHARACTERS],
            "essay": without_tags(debian_file(*ESSAY).decode("utf-8", "replace"))[3_000:][:CHARACTERS],
            "quotations": debian_file(*QUOTATIONS).decode("utf-8", "replace")[:CHARACTERS],
            "other code": debian_file(*OTHER_CODE).decode()[:CHARACTERS],
        },
        "calibration": {
            "help": default_calibration_text(),
            "library": "\n\n".join(library),
            "english": debian_file(*ENGLISH).decode(),
        },
    }
    for kind, parts in texts.items():
        for name, text in parts.items():
            print(f"{kind}: {name}, {len(text)} characters")
    write_text(target, json.dumps(texts))


if __name__ == "__main__":
    main()

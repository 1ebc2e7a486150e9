"""Folders that are whole or not there: written beside their place and renamed into it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from convert.safetensors_file import flush

_LOCK = ".lock"


def staging_path(target: Path) -> Path:
    """Where a folder is written before it gets its name."""
    return target.parent / f".{target.name}.partial"


@contextmanager
def staged(target: Path, *, overwrite: bool, resumable: bool = False) -> Iterator[Path]:
    """A folder to write to, which becomes ``target`` if the block ends without an error.

    What an interrupted process left is removed, or kept for the block to go on from if it is ``resumable``. An old
    folder stays until the new one is whole and on disk.

    Args:
      target: absolute path.
      overwrite: ``target`` may exist, and is replaced.
      resumable: keep what is there at the beginning, and what is there when the block fails.

    Raises:
      FileExistsError: ``target`` exists, is not empty, and ``overwrite`` is False.
      BlockingIOError: another process writes the same folder.
    """
    _refuse_existing(target, overwrite)
    staging = staging_path(target)
    staging.mkdir(parents=True, exist_ok=True)
    lock = FileLock(staging / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BlockingIOError(f"another process is writing {target}") from error
    done = False
    try:
        if not target.exists() and _old(target).exists():  # a process was stopped between two renames
            _old(target).rename(target)
            _refuse_existing(target, overwrite)
        if not resumable:
            _empty(staging)
        for unfinished in staging.glob(".*.tmp"):
            unfinished.unlink()
        yield staging
        for path in [*staging.rglob("*"), staging]:
            flush(path)
        (staging / _LOCK).unlink(missing_ok=True)
        _exchange(staging, target)
        done = True
    finally:
        lock.release()
        if not done and (not resumable or all(path.name == _LOCK for path in staging.iterdir())):
            shutil.rmtree(staging, ignore_errors=True)


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists already; pass overwrite=True to replace it")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def _exchange(staging: Path, target: Path) -> None:
    old = _old(target)
    if target.exists():
        target.rename(old)
    staging.rename(target)
    flush(target.parent)
    if old.is_dir() and not old.is_symlink():
        shutil.rmtree(old)
    else:
        old.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file as :func:`write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name first, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

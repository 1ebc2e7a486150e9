"""Reading and writing safetensors: one tensor at a time from mapped files, float8 included."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "I64": np.int64,
    "I32": np.int32,
    "I8": np.int8,
    "U8": np.uint8,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, known by its header alone.

    Attributes:
      path: the file.
      offset: where its bytes begin.
      dtype: of its elements.
      shape: its sizes.
    """

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        """A read-only view of the file's pages, which the process holds for as long as the array lives."""
        if self.size == 0:
            return np.empty(self.shape, self.dtype)
        # Bytes first: numpy maps no dtype that it does not know itself.
        data = np.memmap(self.path, np.uint8, "r", self.offset, (self.size * self.dtype.itemsize,))
        return data.view(np.ndarray).view(self.dtype).reshape(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file.

    Attributes:
      path: the file.
      tensors: what it holds, by name.
      metadata: free text by key.
    """

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def open_file(path: Path) -> TensorFile:
    """Reads a file's header. The ``safetensors`` package checks it: offsets, gaps, overlaps, sizes, length of the file.

    Raises:
      ValueError: the file is truncated, damaged, names a tensor twice or holds a dtype no weight has.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size), object_pairs_hook=_without_duplicates)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download or copy it again") from error
    metadata = header.pop("__metadata__", None) or {}
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}; supported: {', '.join(_DTYPES)}")
        offset = 8 + header_size + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path, offset, np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]))
    return TensorFile(path, tensors, metadata)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(name for name in names if names.count(name) > 1)!r} twice")
    return result


def open_all(paths: list[Path]) -> tuple[dict[str, StoredTensor], list[TensorFile]]:
    """The tensors of several shards together, and the shards.

    Raises:
      ValueError: a shard is damaged, or two hold a tensor of the same name.
    """
    tensors: dict[str, StoredTensor] = {}
    files = [open_file(path) for path in paths]
    for file in files:
        if twice := tensors.keys() & file.tensors.keys():
            raise ValueError(f"{file.path} holds {sorted(twice)[0]!r}, which another shard holds, too")
        tensors |= file.tensors
    return tensors, files


def write_file(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Writes arrays under a temporary name and renames the file when all of it is on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        contiguous = {name: np.asarray(x, order="C") for name, x in arrays.items()}
        # transformers reads only files that say which framework's layout they have.
        save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
        flush(temporary)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Reading and writing safetensors: one tensor at a time from mapped files, float8 included."""

import json
import math
import os
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

CHECKSUMS = "crc32"  # metadata: a JSON object from tensor names to crc32
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
      checksum: crc32 of its bytes; None if the file has none.
    """

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    checksum: int | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """A read-only view of the file's pages, which the process holds for as long as the array lives.

        Raises:
          ValueError: the bytes are not those that were written.
        """
        if self.size == 0:
            return np.empty(self.shape, self.dtype)
        # Bytes first: numpy maps no dtype that it does not know itself.
        data = np.memmap(self.path, np.uint8, "r", self.offset, (self.nbytes,))
        if self.checksum is not None and zlib.crc32(data) != self.checksum:
            raise ValueError(
                f"{self.path} is damaged: a tensor at byte {self.offset} fails its checksum; copy it again"
            )
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
    checksums = _read_checksums(path, metadata.get(CHECKSUMS), header.keys())
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}; supported: {', '.join(_DTYPES)}")
        offset = 8 + header_size + entry["data_offsets"][0]
        tensors[name] = StoredTensor(
            path, offset, np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"]), checksums.get(name)
        )
    return TensorFile(path, tensors, metadata)


def _read_checksums(path: Path, text: str | None, names: Collection[str]) -> dict[str, int]:
    if text is None:
        return {}
    try:
        checksums = json.loads(text)
    except (ValueError, RecursionError):
        checksums = None
    if not isinstance(checksums, dict) or checksums.keys() != set(names):
        raise ValueError(f"{path} is damaged: its checksums are not those of its tensors; copy it again")
    return checksums


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
    """Writes arrays, with checksums, under a temporary name and renames the file when all of it is on disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        contiguous = {name: np.asarray(x, order="C") for name, x in arrays.items()}
        checksums = {name: zlib.crc32(x.reshape(-1).view(np.uint8)) for name, x in contiguous.items()}
        # transformers reads only files that say which framework's layout they have.
        stored = {"format": "pt", **(metadata or {}), CHECKSUMS: json.dumps(checksums)}
        save_file(contiguous, temporary, metadata=stored)
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

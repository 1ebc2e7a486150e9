"""Reading safetensors without a second copy in memory, float8 included."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

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


def open_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file as read-only views of its pages.

    The ``safetensors`` package checks header, offsets and file size; it cannot hand out float8 through numpy, so
    the bytes are viewed here.

    Raises:
      ValueError: the file is truncated, damaged or holds a dtype no weight has.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); download or copy it again") from error
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    data = np.memmap(path, np.uint8, "r", offset=8 + header_size) if header else np.empty(0, np.uint8)
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} has dtype {entry['dtype']}; supported: {', '.join(_DTYPES)}")
        begin, end = entry["data_offsets"]
        tensors[name] = data[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def open_all(paths: list[Path]) -> dict[str, np.ndarray]:
    """The tensors of several shards.

    Raises:
      ValueError: a shard is damaged, or two hold a tensor of the same name.
    """
    tensors: dict[str, np.ndarray] = {}
    for path in paths:
        shard = open_tensors(path)
        if twice := tensors.keys() & shard.keys():
            raise ValueError(f"{path} holds {sorted(twice)[0]!r}, which another shard holds, too")
        tensors |= shard
    return tensors

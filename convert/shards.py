"""How tensors are spread over the files of a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.folder import write_json
from convert.safetensors_file import write_file
from convert.source import INDEX

SHARD_BYTES = 5 * 10**9


def write_shards(folder: Path, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    """Writes one file, or shards of at most ``SHARD_BYTES`` and an index.

    Args:
      folder: where to.
      tensors: arrays by name.
      metadata: free text that every file gets.
    """
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, value in tensors.items():
        size = value.nbytes
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = value
        filled += size
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0], metadata)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = shard_name(i, len(shards))
        write_file(folder / file, shard, metadata)
        weight_map |= dict.fromkeys(shard, file)
    write_index(folder, weight_map, sum(x.nbytes for x in tensors.values()))


def shard_name(i: int, count: int) -> str:
    """What the i-th of so many shards is called."""
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Writes which shard holds which tensor, as Hugging Face folders do."""
    write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)})

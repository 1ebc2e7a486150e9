"""Quantising a checkpoint that does not fit in memory: block by block, from files to files."""

import gc
import hashlib
import json
import math
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from convert import native
from convert.checkpoint import FloatModel, open_float, read_config
from convert.folder import staged, write_json
from convert.safetensors_file import open_file, write_file
from convert.shards import shard_name, write_index
from convert.source import read_json, resolve, weight_files
from convert.tensors import Table, TensorSpec, lookup
from convert.tokenizer import copy_tokenizer
from fireq_jax.calibrate import Observer, cut_windows
from fireq_jax.config import Recipe, resolve_recipe
from fireq_jax.quantize import BlockQuantizer, pick_group_size, quantize_head

_PLAN, _STATE = "conversion.json", "conversion.safetensors"


class Sizes(NamedTuple):
    """Bytes of a model's parameters before and after a conversion."""

    before: int
    after: int


def quantize_checkpoint(
    source: str | Path,
    folder: str | Path,
    recipe: Recipe | str = "data_free",
    *,
    tokens: np.ndarray | list[int] | None = None,
    window: int | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    restart: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Sizes:
    """Writes the quantised checkpoint of a float model that is never in memory as a whole.

    The result is that of :func:`fireq_jax.quantize` with the same recipe and calibration. A decoder block at a time is
    read, calibrated if the recipe asks for it, quantised, written as a shard and dropped. A conversion that was
    interrupted goes on where it was when it is called again with the same arguments.

    Memory: one block in float and once more for what is computed with it, the embedding where it is tied or calibrated
    with, and about 0.5 GB for the process. A calibrated recipe adds the text's hidden states, ``tokens · hidden · 12``
    bytes on the host and 8 on the device, and on the device second moments of a block, ``(intermediate² + 3 · hidden²)
    · 4`` bytes, a few times over while it rounds. On a GPU all computation, and its memory, is on the GPU.

    Args:
      source: as for :func:`convert.load`: a float model.
      folder: where to write.
      recipe: a :class:`fireq_jax.Recipe` or the name of a preset; not one that differentiates the whole model.
      tokens: token ids to calibrate on, for a recipe that needs it.
      window: tokens per sequence of that text; None as for :func:`fireq_jax.calibrate`.
      revision: branch, tag or commit of a hub repository.
      overwrite: replace a folder that exists.
      restart: begin anew if an interrupted conversion with other arguments is found.
      progress: called with (shards written, shards in all).

    Raises:
      FileExistsError: the folder exists, is not empty, and ``overwrite`` is False.
      BlockingIOError: another process writes the same folder.
      OSError: the disk is too small for the result.
      ValueError: as :func:`convert.load` and :func:`fireq_jax.quantize`; the recipe differentiates; or an interrupted
        conversion with other arguments is there and ``restart`` is False.
    """
    recipe = resolve_recipe(recipe)
    if recipe.differentiates:
        raise ValueError(f"recipe {recipe.name!r} differentiates the whole model; use fireq_jax.quantize")
    if recipe.needs_calibration and tokens is None:
        raise ValueError(f"recipe {recipe.name!r} needs tokens to calibrate on; 'data_free' needs none")
    path = resolve(source, revision)
    model = open_float(path, None)
    windows = cut_windows(model.config, tokens, window) if tokens is not None and recipe.needs_calibration else None
    group_sizes = _group_sizes(model.table, recipe)
    target = Path(folder).expanduser().absolute()
    arguments = {
        "source": _fingerprint(path),
        "recipe": asdict(recipe),
        "tokens": None if windows is None else [*windows.shape, hashlib.sha256(windows.tobytes()).hexdigest()],
        "library_version": version("fireq-jax"),
    }
    with staged(target, overwrite=overwrite, resumable=True) as staging:
        copy_tokenizer(path, staging)
        checkpoint_id = _plan(staging, json.loads(json.dumps(arguments)), restart)
        _check_space(staging, model, group_sizes, recipe)
        conversion = _Conversion(staging, model, recipe, windows, checkpoint_id)
        conversion.run(progress)
        config = model.config.to_hf() | {"dtype": jnp.dtype(model.dtype).name}
        config["fireq"] = native.describe(recipe, group_sizes, checkpoint_id)
        write_json(staging / "config.json", config)
        (staging / _PLAN).unlink()
        (staging / _STATE).unlink(missing_ok=True)
    return Sizes(sum(_float_bytes(spec, model.dtype) for spec in model.table.values()), conversion.bytes)


class _Conversion:
    """One conversion: shard 0 is the embedding, the last one the final norm and the output projection."""

    def __init__(
        self, folder: Path, model: FloatModel, recipe: Recipe, windows: np.ndarray | None, checkpoint_id: str
    ) -> None:
        self._folder, self._model, self._recipe, self._windows = folder, model, recipe, windows
        self._metadata = {native.ID_KEY: checkpoint_id}
        self._layers = model.config.num_layers
        self._count = self._layers + 2
        self._weight_map: dict[str, str] = {}
        self.bytes = 0

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        """Writes the shards that are not there yet, and the index."""
        done = self._resume()

        def report(shards: int) -> None:
            if progress is not None:
                progress(shards, self._count)

        report(done)
        if done == 0:
            self._copy(0, ("embed",))
            done = 1
            report(done)
        if done <= self._layers:
            self._quantize_layers(done - 1, report)
        if self._recipe.lm_head == "float":
            self._copy(self._count - 1, ("final_norm", "lm_head"))
        else:
            tied = self._model.config.tie_word_embeddings
            head = self._embedding() if tied else self._read("lm_head")["kernel"]
            last = {"final_norm": self._read("final_norm"), "lm_head": {"kernel": quantize_head(head, self._recipe)}}
            self._write(self._count - 1, last)
        report(self._count)
        write_index(self._folder, self._weight_map, self.bytes)

    def _quantize_layers(self, first: int, report: Callable[[int], None]) -> None:
        config, windows = self._model.config, self._windows
        observer, embedding = None, None
        if windows is not None:
            embedding = self._embedding()
            observer = Observer(config, embedding, windows)
        calibrated = None if windows is None else config
        blocks = BlockQuantizer(self._recipe, calibrated, embedding, windows)
        del embedding
        if observer is not None and first > 0:
            state = {name: x.read() for name, x in open_file(self._folder / _STATE).tensors.items()}
            observer.restore(state)
            blocks.restore(state)
        for i in range(first, self._layers):
            name = f"layers_{i}"
            layer = self._read(name)
            statistics = None if observer is None else observer.observe(layer)
            layer = jax.block_until_ready(blocks.round(name, *blocks.transform(name, layer, statistics)))
            self._write(i + 1, {name: layer})
            if observer is not None:
                # Behind the shard: after a crash between the two the block is done again, with the same result.
                write_file(self._folder / _STATE, observer.state() | blocks.state(), {"blocks": str(i + 1)})
            del layer, statistics
            gc.collect()  # arrays in reference cycles would pile up
            report(i + 2)

    def _copy(self, index: int, parts: tuple[str, ...]) -> None:
        """Writes float tensors as they are, without a copy in memory."""
        kept = {
            name: self._model.read(name).astype(self._model.dtype, copy=False)
            for name, spec in self._model.table.items()
            if spec.path[0] in parts
        }
        native.check_finite(kept, str(self._model.source))
        self._write_arrays(index, kept)

    def _read(self, part: str) -> dict[str, Any]:
        """The float parameters of one part of the model."""
        names = [name for name, spec in self._model.table.items() if spec.path[0] == part]
        values = ((name, self._model.read(name)) for name in names)
        params = native.assemble(values, self._model.table, self._model.dtype)
        native.check_finite(params, str(self._model.source))
        found: dict[str, Any] = params[part]
        return found

    def _embedding(self) -> jax.Array:
        embedding: jax.Array = self._read("embed")["embedding"]
        return embedding

    def _write(self, index: int, params: Mapping[str, Any]) -> None:
        table = native.full_table(self._model.config, "lm_head" in params, lambda _: True)
        specs = [spec for spec in table.values() if lookup(params, spec.path) is not None]
        self._write_arrays(index, native.named_arrays(specs, params))

    def _write_arrays(self, index: int, arrays: Mapping[str, Any]) -> None:
        file = shard_name(index, self._count)
        write_file(self._folder / file, arrays, self._metadata)
        self._count_in(file, arrays)

    def _count_in(self, file: str, tensors: Mapping[str, Any]) -> None:
        self._weight_map |= dict.fromkeys(tensors, file)
        self.bytes += sum(x.nbytes for x in tensors.values())

    def _resume(self) -> int:
        """Counts in the shards that an interrupted conversion wrote, and returns how many there are."""
        done = 0
        while done < self._count - 1 and (self._folder / shard_name(done, self._count)).is_file():
            done += 1
        if self._windows is not None and 1 < done <= self._layers + 1:
            # The state may be that of the block before the last one written.
            state = self._folder / _STATE
            done = 1 + int(open_file(state).metadata["blocks"]) if state.is_file() else 1
        for i in range(done):
            file = shard_name(i, self._count)
            self._count_in(file, open_file(self._folder / file).tensors)
        return done


def _plan(staging: Path, arguments: dict[str, Any], restart: bool) -> str:
    """The id of the checkpoint being made, an interrupted conversion's if its arguments are the same."""
    plan = staging / _PLAN
    if plan.is_file():
        found = read_json(plan)
        if found.get("arguments") == arguments:
            return str(found["checkpoint_id"])
        if not restart:
            changed = [key for key in arguments if (found.get("arguments") or {}).get(key) != arguments[key]]
            raise ValueError(
                f"{staging} holds an unfinished conversion with another {' and '.join(changed)}; "
                "finish it with the arguments it was begun with, or pass restart=True to drop it"
            )
    for old in staging.glob("*.safetensors"):
        old.unlink()
    checkpoint_id = uuid.uuid4().hex
    write_json(plan, {"arguments": arguments, "checkpoint_id": checkpoint_id})
    return checkpoint_id


def _fingerprint(path: Path) -> dict[str, Any]:
    """What tells a source from another one or from a later state of itself, without reading its weights."""
    files = [path] if path.is_file() else [path / "config.json", *weight_files(path)]
    return {
        "config": None if path.is_file() else read_config(path),
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }


def _group_sizes(table: Table, recipe: Recipe) -> dict[str, int]:
    if recipe.weights == "none":
        return {}
    sizes = {
        spec.module: pick_group_size(spec.stored_shape[1], recipe, name)
        for name, spec in table.items()
        if spec.input_axes and spec.module != "lm_head"
    }
    if recipe.lm_head == "int4":
        hidden = table["model.embed_tokens.weight"].shape[1]
        sizes["lm_head"] = pick_group_size(hidden, recipe, "lm_head")
    return sizes


def _float_bytes(spec: TensorSpec, dtype: Any) -> int:
    return math.prod(spec.shape) * jnp.dtype(spec.dtype or dtype).itemsize


def _check_space(staging: Path, model: FloatModel, group_sizes: Mapping[str, int], recipe: Recipe) -> None:
    """Raises OSError if the result cannot fit beside what is there already."""
    needed = 0
    for spec in model.table.values():
        elements = math.prod(spec.shape)
        group = group_sizes.get(spec.module) if spec.input_axes else None
        needed += _float_bytes(spec, model.dtype) if group is None else elements // 2 + 2 * elements // group
    if recipe.lm_head != "float" and model.config.tie_word_embeddings:  # another copy, of a byte per element or less
        needed += model.config.vocab_size * (model.config.hidden_size + 4)
    needed -= sum(file.stat().st_size for file in staging.glob("*.safetensors"))
    if (free := shutil.disk_usage(staging).free) < needed:
        raise OSError(f"{staging.parent} has {free:,} bytes free, the checkpoint needs {needed:,} more")

"""Loading checkpoints of every kind, and saving them so that a crash leaves the old one or none."""

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert import compressed, native
from convert.folder import staged, write_json
from convert.gguf_file import open_gguf
from convert.safetensors_file import StoredTensor, open_all
from convert.shards import write_shards
from convert.source import read_json, resolve, weight_files
from convert.tensors import Table, check_layers, check_tensors, is_ignorable, lookup
from fireq_jax.config import LlamaConfig
from fireq_jax.llama import Llama
from fireq_jax.qtensor import Layout
from fireq_jax.quantize import recipe_of

_FLOATS = ("float32", "float16", "bfloat16")


def load(
    source: str | Path, *, dtype: Any = None, revision: str | None = None, layout: Layout = "auto"
) -> tuple[Llama, dict[str, Any]]:
    """Loads a Llama from safetensors, GGUF, a checkpoint of :func:`save` or one of compressed-tensors.

    Files are mapped, not read: a tensor's pages are held only until it is on its device.

    Args:
      source: a folder with ``config.json`` and safetensors (one file, or shards with an index), a ``.gguf`` file, a
        Hugging Face hub id (``"org/name"``) or a GGUF file in a hub repository (``"org/name/file.gguf"``). Of
        compressed-tensors checkpoints those with symmetric int4 weights (:mod:`convert.compressed`).
      dtype: of weights and computation, "float32", "bfloat16" or "float16"; None takes the stored one (bfloat16
        for GGUF). Quantised weights and their scales stay as they are.
      revision: branch, tag or commit of a hub repository.
      layout: of int4 weights, see :func:`fireq_jax.to_layout`.

    Returns:
      The Flax model and its parameters: nested dicts of ``jax.Array``, with :class:`fireq_jax.Int4Weight` leaves
      if the checkpoint is quantised.

    Raises:
      FileNotFoundError: the source, a shard or ``config.json`` is missing.
      ValueError: the model is no supported Llama, a file is damaged, the weights are pickles, files of two
        checkpoints are mixed, or tensors are missing, unexpected or of the wrong shape (all of them are named).
    """
    if dtype is not None and jnp.dtype(dtype).name not in _FLOATS:
        raise ValueError(f"dtype={jnp.dtype(dtype).name} must be one of {', '.join(_FLOATS)}")
    path = resolve(source, revision)
    if path.suffix == ".gguf" or not _is_quantized(hf_config := read_config(path)):
        model = open_float(path, dtype)
        values = ((name, model.read(name)) for name in model.table)
        return Llama(model.config, model.dtype), native.assemble(values, model.table, model.dtype)
    settings = hf_config.pop("quantization_config", None)
    config = LlamaConfig.from_hf(hf_config)
    tensors, files = open_all(weight_files(path))
    check_layers(config, len(tensors), str(path))

    def float_dtype(table: Table) -> Any:
        return _common_dtype(tensors, table, dtype, str(path))

    if "fireq" in hf_config:
        return native.load_quantized(config, hf_config["fireq"], tensors, files, float_dtype, layout, str(path))
    return compressed.load_compressed(config, settings, tensors, float_dtype, layout, str(path))


def _is_quantized(hf_config: Mapping[str, Any]) -> bool:
    settings = hf_config.get("quantization_config")
    return "fireq" in hf_config or (isinstance(settings, Mapping) and settings.get("quant_method") == compressed.METHOD)


@dataclass(frozen=True)
class FloatModel:
    """A float checkpoint whose tensors are read one at a time.

    Attributes:
      source: the folder or file.
      config: the model.
      dtype: of its weights.
      table: its tensors, by Hugging Face name; names and shapes have been compared with what is there.
      read: gives a tensor's values by name, as stored.
    """

    source: Path
    config: LlamaConfig
    dtype: Any
    table: Table
    read: Callable[[str], np.ndarray]


def open_float(path: Path, dtype: Any) -> FloatModel:
    """Opens a folder or a GGUF file with float (or, in GGUF, dequantisable) weights.

    Args:
      path: what :func:`convert.source.resolve` returned.
      dtype: None takes the stored one (bfloat16 for GGUF).

    Raises:
      ValueError: as :func:`load`, or the checkpoint is quantised by this library already.
    """
    if path.suffix == ".gguf":
        gguf = open_gguf(path)
        return FloatModel(path, gguf.config, jnp.dtype(dtype or jnp.bfloat16), gguf.table(), gguf.read)
    hf_config = read_config(path)
    if _is_quantized(hf_config):
        raise ValueError(f"{path} is quantised already; quantise the float model that it came from")
    config = LlamaConfig.from_hf(hf_config)
    tensors, _ = open_all(weight_files(path))
    check_layers(config, len(tensors), str(path))
    table = native.full_table(config, False, lambda spec: spec.name in tensors)
    ignorable = [name for name in tensors if is_ignorable(name, config)]
    expected = {name: spec.stored_shape for name, spec in table.items()}
    check_tensors({name: x.shape for name, x in tensors.items()}, expected, ignorable, str(path))
    dtype = _common_dtype(tensors, table, dtype, str(path))
    return FloatModel(path, config, dtype, table, lambda name: tensors[name].read())


def checkpoint_id(source: str | Path, revision: str | None = None) -> str | None:
    """What tells a checkpoint of this library from every other one; None for other models.

    Args:
      source: as for :func:`load`.
      revision: branch, tag or commit of a hub repository.
    """
    path = resolve(source, revision)
    block = None if path.suffix == ".gguf" else read_config(path).get("fireq")
    return block.get("checkpoint_id") if isinstance(block, Mapping) else None


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's ``config.json``, with the tokens that end a turn."""
    hf_config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
        hf_config["eos_token_id"] = eos  # chat models end turns with more tokens than config.json names
    return hf_config


def _common_dtype(tensors: Mapping[str, StoredTensor], table: Table, dtype: Any, source: str) -> Any:
    """``dtype``, or the one that the table's float tensors are stored in if that is None.

    Raises:
      ValueError: one of them is stored as something else than a float.
    """
    stored = {tensors[name].dtype.name for name, spec in table.items() if spec.dtype is None}
    if not stored <= set(_FLOATS):
        raise ValueError(f"{source}: weights must be {', '.join(_FLOATS)}, found {', '.join(sorted(stored))}")
    if dtype is not None:
        return jnp.dtype(dtype)
    return jnp.dtype(stored.pop()) if len(stored) == 1 else jnp.dtype(jnp.float32)


def save(
    folder: str | Path,
    model: Llama,
    params: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that :func:`load` reads back bit for bit.

    Float parameters become an ordinary Hugging Face folder; :mod:`convert.native` says what a quantised one holds.
    Everything is written under a temporary name first and renamed when it is whole and on disk. What a process that
    was stopped left behind is removed by the next one that writes the same folder.

    Args:
      folder: where to write.
      model: the model the parameters belong to.
      params: float or quantised parameters.
      tokenizer: a transformers tokenizer to store beside them.
      overwrite: replace a folder that exists.

    Raises:
      FileExistsError: the folder exists, is not empty, and ``overwrite`` is False.
      BlockingIOError: another process writes the same folder.
      ValueError: a parameter of the model is missing.
    """
    separate_head = lookup(params, ("lm_head", "kernel")) is not None
    table = native.full_table(model.config, separate_head, lambda spec: lookup(params, spec.path) is not None)
    tensors = native.named_arrays(table.values(), params)
    config = model.config.to_hf() | {"dtype": jnp.dtype(model.dtype).name}
    metadata = {}
    if (recipe := recipe_of(params)) is not None:
        metadata[native.ID_KEY] = uuid.uuid4().hex
        config["fireq"] = native.describe(recipe, native.group_sizes_of(table, params), metadata[native.ID_KEY])
    with staged(Path(folder).expanduser().absolute(), overwrite=overwrite) as staging:
        write_shards(staging, tensors, metadata)
        write_json(staging / "config.json", config)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)

"""Loading checkpoints of every kind, and saving them so that a crash leaves the old one or none."""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from convert.gguf_file import open_gguf
from convert.safetensors_file import open_all
from convert.source import read_json, resolve, weight_files
from convert.tensors import TensorSpec, check_tensors, insert, is_ignorable, lookup, tensor_table
from fireq_jax.config import LlamaConfig, Recipe
from fireq_jax.llama import Llama
from fireq_jax.qtensor import Int4Weight
from fireq_jax.quantize import recipe_of

FORMAT_VERSION = 1
SHARD_BYTES = 5 * 10**9
_FLOATS = ("float32", "float16", "bfloat16")
Table = dict[str, TensorSpec]
_INT4_PARTS = ("codes", "scales", "tensor_scale")


def load(source: str | Path, *, dtype: Any = None, revision: str | None = None) -> tuple[Llama, dict[str, Any]]:
    """Loads a Llama from safetensors, GGUF or a checkpoint of :func:`save`.

    Args:
      source: a folder with ``config.json`` and safetensors (one file, or shards with an index), a ``.gguf`` file, a
        Hugging Face hub id (``"org/name"``) or a GGUF file in a hub repository (``"org/name/file.gguf"``).
      dtype: of weights and computation, "float32", "bfloat16" or "float16"; None takes the stored one (bfloat16
        for GGUF). Quantised weights and their scales stay as they are.
      revision: branch, tag or commit of a hub repository.

    Returns:
      The Flax model and its parameters: nested dicts of ``jax.Array``, with :class:`fireq_jax.Int4Weight` leaves
      if the checkpoint is quantised.

    Raises:
      FileNotFoundError: the source, a shard or ``config.json`` is missing.
      ValueError: the model is no supported Llama, a file is damaged, the weights are pickles, or tensors are
        missing, unexpected or of the wrong shape (all of them are named).
    """
    if dtype is not None and jnp.dtype(dtype).name not in _FLOATS:
        raise ValueError(f"dtype={jnp.dtype(dtype).name} must be one of {', '.join(_FLOATS)}")
    path = resolve(source, revision)
    if path.suffix == ".gguf":
        gguf = open_gguf(path)
        dtype = jnp.dtype(dtype or jnp.bfloat16)
        return Llama(gguf.config, dtype), _assemble(gguf.tensors(), tensor_table(gguf.config), dtype)
    hf_config = read_json(path / "config.json")
    generation = path / "generation_config.json"
    if generation.is_file() and (eos := read_json(generation).get("eos_token_id")) is not None:
        hf_config["eos_token_id"] = eos  # chat models end turns with more tokens than config.json names
    config = LlamaConfig.from_hf(hf_config)
    tensors = open_all(weight_files(path))
    if "fireq" in hf_config:
        return _load_quantized(config, hf_config["fireq"], tensors, dtype, str(path))
    table = _own_table(config, False, lambda spec: spec.name in tensors)
    ignorable = [name for name in tensors if is_ignorable(name, config)]
    expected = {name: spec.stored_shape for name, spec in table.items()}
    check_tensors({name: x.shape for name, x in tensors.items()}, expected, ignorable, str(path))
    dtype = _common_dtype(tensors, table, dtype, str(path))
    return Llama(config, dtype), _assemble(((name, tensors[name]) for name in table), table, dtype)


def _common_dtype(tensors: Mapping[str, np.ndarray], table: Table, dtype: Any, source: str) -> Any:
    stored = {tensors[name].dtype.name for name, spec in table.items() if spec.dtype is None}
    if not stored <= set(_FLOATS):
        raise ValueError(f"{source}: weights must be {', '.join(_FLOATS)}, found {', '.join(sorted(stored))}")
    if dtype is not None:
        return jnp.dtype(dtype)
    return jnp.dtype(stored.pop()) if len(stored) == 1 else jnp.dtype(jnp.float32)


def _assemble(tensors: Iterator[tuple[str, np.ndarray]], table: Table, dtype: Any) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for name, value in tensors:
        spec = table[name]
        kept = dtype if spec.dtype is None else spec.dtype
        insert(params, spec.path, jnp.asarray(value.astype(kept).reshape(spec.shape)))
    return params


def save(
    folder: str | Path,
    model: Llama,
    params: Mapping[str, Any],
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that :func:`load` reads back bit for bit.

    Float parameters become an ordinary Hugging Face folder. Of a quantised weight ``NAME.weight`` the parts are
    stored as ``NAME.codes`` (uint8, packed int4), ``NAME.scales`` (e4m3 or bf16) and ``NAME.tensor_scale``
    (float32), and ``config.json`` has a ``fireq`` block with format version, library version and recipe. Everything
    is written under a temporary name first and renamed when it is whole.

    Args:
      folder: where to write.
      model: the model the parameters belong to.
      params: float or quantised parameters.
      tokenizer: a transformers tokenizer to store beside them.
      overwrite: replace a folder that exists.

    Raises:
      FileExistsError: the folder exists, is not empty, and ``overwrite`` is False.
      ValueError: a parameter of the model is missing.
    """
    target = Path(folder).expanduser().absolute()
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists already; pass overwrite=True to replace it")
    tensors = _named_arrays(model.config, params)
    config = model.config.to_hf() | {"dtype": jnp.dtype(model.dtype).name}
    if (recipe := recipe_of(params)) is not None:
        config["fireq"] = {
            "format_version": FORMAT_VERSION,
            "library_version": version("fireq-jax"),
            "recipe": asdict(recipe),
        }
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        _write_shards(staging, tensors)
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        staging.chmod(0o755)  # mkdtemp makes folders that nobody else can read
        if target.exists():
            replaced = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            target.rename(replaced / target.name)
            staging.rename(target)
            shutil.rmtree(replaced)
        else:
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _named_arrays(config: LlamaConfig, params: Mapping[str, Any]) -> dict[str, jax.Array]:
    named: dict[str, jax.Array] = {}
    separate_head = lookup(params, ("lm_head", "kernel")) is not None
    table = _own_table(config, separate_head, lambda spec: lookup(params, spec.path) is not None)
    for name, spec in table.items():
        value = lookup(params, spec.path)
        if value is None:
            raise ValueError(f"params lack {'/'.join(spec.path)}")
        if isinstance(value, Int4Weight):
            for part in _INT4_PARTS:
                named[_part_name(name, part)] = getattr(value, part)
        else:
            named[name] = value.reshape(spec.stored_shape)
    return named


def _own_table(config: LlamaConfig, separate_head: bool, present: Callable[[TensorSpec], bool]) -> Table:
    """The tensor table with what only this library's pytrees hold.

    Args:
      config: the model.
      separate_head: a tied model has an output projection of its own (a quantised one).
      present: whether a layer has one of the tensors that are applied behind the rotation of keys
        (:mod:`fireq_jax.scaling`).
    """
    table = tensor_table(config)
    per_channel = (config.num_kv_heads, config.head_dim)
    behind_rope = {
        "post_rope_scale": per_channel,
        "key_offset": per_channel,
        "key_rotation": (config.head_dim, config.head_dim),
    }
    for i in range(config.num_layers):
        for leaf, shape in behind_rope.items():
            # Applied in float32, whatever the weights are.
            path = (f"layers_{i}", "attention", leaf)
            spec = TensorSpec(f"model.layers.{i}.self_attn.{leaf}", path, shape, shape, dtype=np.float32)
            if present(spec):
                table[spec.name] = spec
    if separate_head and "lm_head.weight" not in table:
        shape = (config.vocab_size, config.hidden_size)
        table["lm_head.weight"] = TensorSpec("lm_head.weight", ("lm_head", "kernel"), shape, shape, 1)
    return table


def _part_name(name: str, part: str) -> str:
    return f"{name.removesuffix('.weight')}.{part}"


def _write_shards(folder: Path, tensors: Mapping[str, jax.Array]) -> None:
    shards: list[dict[str, jax.Array]] = [{}]
    filled = 0
    for name, value in tensors.items():
        size = value.size * value.dtype.itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = value
        filled += size
    if len(shards) == 1:
        _save_arrays(folder / "model.safetensors", shards[0])
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _save_arrays(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(x.size * x.dtype.itemsize for x in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save_arrays(path: Path, arrays: Mapping[str, jax.Array]) -> None:
    save_file({name: np.asarray(x, order="C") for name, x in arrays.items()}, path, metadata={"format": "pt"})


def _read_recipe(block: Mapping[str, Any], source: str) -> Recipe:
    if (found := block.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"{source}: checkpoint format {found!r} was written by fireq-jax "
            f"{block.get('library_version', 'of unknown version')}; this version reads format {FORMAT_VERSION}"
        )
    settings = dict(block.get("recipe") or {})
    known = {field.name for field in fields(Recipe)}
    if settings.keys() != known:
        raise ValueError(f"{source}: the recipe has the fields {sorted(settings)}, expected {sorted(known)}")
    if isinstance(settings["group_size"], list):
        settings["group_size"] = tuple(settings["group_size"])
    return Recipe(**settings)


def _load_quantized(
    config: LlamaConfig, block: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: Any, source: str
) -> tuple[Llama, dict[str, Any]]:
    recipe = _read_recipe(block, source)
    table = _own_table(config, recipe.lm_head, lambda spec: spec.name in tensors)
    quantized = set()
    if recipe.weights == "int4":
        quantized = {n for n, spec in table.items() if spec.input_axes and (n != "lm_head.weight" or recipe.lm_head)}
    floats = {name: spec for name, spec in table.items() if name not in quantized}
    # Int4Weight.validate knows what shapes belong together; here only names and float shapes are compared.
    expected = {name: spec.stored_shape for name, spec in floats.items()}
    for name in quantized:
        for part in _INT4_PARTS:
            full = _part_name(name, part)
            expected[full] = tuple(tensors[full].shape) if full in tensors else ()
    check_tensors({name: x.shape for name, x in tensors.items()}, expected, [], source)
    float_dtype = _common_dtype(tensors, floats, dtype, source)
    params = _assemble(((name, tensors[name]) for name in floats), floats, float_dtype)
    for name in sorted(quantized):
        spec = table[name]
        weight = Int4Weight(
            **{part: jnp.asarray(tensors[_part_name(name, part)]) for part in _INT4_PARTS},
            out_shape=spec.shape[: -spec.input_axes],
            in_shape=spec.shape[-spec.input_axes :],
            numerics=recipe.numerics,
            activations=recipe.activations,
        )
        weight.validate(f"{source}: {name}")
        insert(params, spec.path, weight)
    return Llama(config, float_dtype), params | {"recipe": recipe}

"""This library's own checkpoints: what is in them beside a Hugging Face folder's tensors, and how it is checked.

Of a quantised weight ``NAME.weight`` the parts are stored as ``NAME.codes`` (uint8, two int4 codes to a byte, the first
in the low half), ``NAME.scales`` (e4m3 or bf16) and ``NAME.tensor_scale`` (float32); of an output projection in bytes
``lm_head.codes`` (int8 or e4m3) and ``lm_head.scales`` (float32). ``config.json`` has a ``fireq`` block:

    format_version    4
    library_version   of fireq-jax, when it was written
    checkpoint_id     also in the metadata of every shard, so that shards of two checkpoints do not mix
    layout            "rows": how codes and scales lie in their tensors
    scale_dtype       "float8_e4m3fn" or "bfloat16"; null if no weight is int4
    group_sizes       inputs that share a scale, by module ("self_attn.q_proj", ..., "lm_head")
    recipe            every field of the Recipe
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from convert.safetensors_file import StoredTensor, TensorFile
from convert.tensors import Table, TensorSpec, check_tensors, insert, lookup, tensor_table
from fireq_jax.config import LlamaConfig, Recipe
from fireq_jax.llama import Llama
from fireq_jax.qtensor import ByteWeight, Int4Weight, Layout, is_int4, to_layout
from fireq_jax.quantize import all_finite

FORMAT_VERSION = 4
LAYOUT = "rows"
ID_KEY = "fireq_checkpoint_id"
CHECKED_ROWS = 1 << 14
_PARTS = ("codes", "scales", "tensor_scale")
_BYTE_PARTS = _PARTS[:2]
_BLOCK = ("format_version", "library_version", "checkpoint_id", "layout", "scale_dtype", "group_sizes", "recipe")


def full_table(config: LlamaConfig, separate_head: bool, present: Callable[[TensorSpec], bool]) -> Table:
    """The tensor table with what only this library's pytrees hold.

    Args:
      config: the model.
      separate_head: a tied model has an output projection of its own (a quantised one).
      present: whether a layer has one of the tensors that are applied behind the rotation of keys
        (:mod:`fireq_jax.scaling`).
    """
    table = tensor_table(config)
    per_channel = (config.num_kv_heads, config.head_dim)
    for i in range(config.num_layers):
        for leaf in ("post_rope_scale", "key_offset"):
            # Applied in float32, whatever the weights are.
            path = (f"layers_{i}", "attention", leaf)
            name = f"model.layers.{i}.self_attn.{leaf}"
            spec = TensorSpec(name, path, per_channel, per_channel, dtype=np.float32)
            if present(spec):
                table[spec.name] = spec
    if separate_head and "lm_head.weight" not in table:
        shape = (config.vocab_size, config.hidden_size)
        table["lm_head.weight"] = TensorSpec("lm_head.weight", ("lm_head", "kernel"), shape, shape, 1)
    return table


def named_arrays(specs: Iterable[TensorSpec], params: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What is stored of these tensors, by name.

    Raises:
      ValueError: ``params`` lacks one of them.
    """
    named: dict[str, jax.Array] = {}
    for spec in specs:
        value = lookup(params, spec.path)
        if value is None:
            raise ValueError(f"params lack {'/'.join(spec.path)}")
        if is_int4(value):
            rows = value.rows
            named |= {_part_name(spec.name, part): getattr(rows, part) for part in _PARTS}
        elif isinstance(value, ByteWeight):
            named |= {_part_name(spec.name, part): getattr(value, part) for part in _BYTE_PARTS}
        else:
            same = value.shape == spec.stored_shape  # reshaping copies
            named[spec.name] = value if same else value.reshape(spec.stored_shape)
    return named


def describe(recipe: Recipe, group_sizes: Mapping[str, int], checkpoint_id: str) -> dict[str, Any]:
    """The ``fireq`` block of ``config.json``."""
    scale_dtype = "float8_e4m3fn" if recipe.scales == "sigma_fp8" else "bfloat16"
    return {
        "format_version": FORMAT_VERSION,
        "library_version": version("fireq-jax"),
        "checkpoint_id": checkpoint_id,
        "layout": LAYOUT,
        "scale_dtype": scale_dtype if group_sizes else None,
        "group_sizes": dict(group_sizes),
        "recipe": asdict(recipe),
    }


def group_sizes_of(table: Table, params: Mapping[str, Any]) -> dict[str, int]:
    """The group size of every kind of quantised weight, by module."""
    weights = {spec.module: lookup(params, spec.path) for spec in table.values() if spec.input_axes}
    return {module: weight.group_size for module, weight in weights.items() if is_int4(weight)}


def load_quantized(
    config: LlamaConfig,
    block: Any,
    tensors: Mapping[str, StoredTensor],
    files: Iterable[TensorFile],
    float_dtype: Callable[[Table], Any],
    layout: Layout,
    source: str,
) -> tuple[Llama, dict[str, Any]]:
    """Model and parameters of a checkpoint with a ``fireq`` block.

    Args:
      config: the model.
      block: what ``config.json`` has under ``fireq``.
      tensors: of all shards.
      files: the shards.
      float_dtype: picks the dtype of the unquantised weights from their table.
      layout: of the weights in the pytree, see :func:`fireq_jax.to_layout`.
      source: what errors call the checkpoint.

    Raises:
      ValueError: the block is of another format or damaged, shards are of another checkpoint, or tensors and block
        contradict each other.
    """
    recipe = check_block(block, files, source)
    table = full_table(config, recipe.lm_head != "float", lambda spec: spec.name in tensors)
    quantized: Table = {}
    if recipe.weights == "int4":
        quantized = {
            n: spec
            for n, spec in table.items()
            if spec.input_axes and (spec.module != "lm_head" or recipe.lm_head == "int4")
        }
    head = table.get("lm_head.weight") if recipe.lm_head in ("int8", "fp8") else None
    floats = {name: spec for name, spec in table.items() if name not in quantized and spec is not head}
    expected: dict[str, tuple[int, ...]] = {name: spec.stored_shape for name, spec in floats.items()}
    for name, spec in quantized.items():
        n, k = spec.stored_shape
        group = _group_size(block, spec, k, source)
        expected |= dict(zip((_part_name(name, p) for p in _PARTS), ((n, k // 2), (n, k // group), ()), strict=True))
    if head is not None:
        shapes = head.stored_shape, head.stored_shape[:1]
        expected |= dict(zip((_part_name(head.name, p) for p in _BYTE_PARTS), shapes, strict=True))
    check_tensors({name: x.shape for name, x in tensors.items()}, expected, [], source)
    for name in quantized:
        if (found := tensors[_part_name(name, "scales")].dtype.name) != block["scale_dtype"]:
            raise ValueError(f"{source}: {name} has {found} scales, config.json says {block['scale_dtype']}")
    if head is not None:  # before memory is taken for it
        found = tensors[_part_name(head.name, "codes")].dtype.name
        if found != {"int8": "int8", "fp8": "float8_e4m3fn"}[recipe.lm_head]:
            raise ValueError(f"{source}: {head.name} has {found} codes, the recipe says {recipe.lm_head}")
    dtype = float_dtype(floats)
    params = assemble(((name, tensors[name].read()) for name in floats), floats, dtype)
    check_finite(params, source)
    for name, spec in quantized.items():
        weight = Int4Weight(
            **{part: to_device(tensors[_part_name(name, part)].read()) for part in _PARTS},
            out_shape=spec.shape[: -spec.input_axes],
            in_shape=spec.shape[-spec.input_axes :],
            numerics=recipe.numerics,
            activations=recipe.activations,
        )
        weight.validate(f"{source}: {name}")
        insert(params, spec.path, to_layout(weight, layout))
    if head is not None:
        codes, scales = (to_device(tensors[_part_name(head.name, part)].read()) for part in _BYTE_PARTS)
        projection = ByteWeight(codes, scales, head.shape[:1], head.shape[1:])
        projection.validate(f"{source}: {head.name}")
        insert(params, head.path, projection)
    return Llama(config, dtype), params | {"recipe": recipe}


def check_block(block: Any, files: Iterable[TensorFile], source: str) -> Recipe:
    """The recipe of a ``fireq`` block, after the block and the identity of all shards were checked.

    Raises:
      ValueError: the block is of another format or damaged, or a shard is of another checkpoint.
    """
    recipe = _read_recipe(block, source)
    for file in files:
        if (found := file.metadata.get(ID_KEY)) != block["checkpoint_id"]:
            raise ValueError(
                f"{file.path} is of checkpoint {found}, config.json of {block['checkpoint_id']}: files of two "
                "checkpoints are mixed, or a copy was not finished. Copy the whole folder again"
            )
    return recipe


def assemble(tensors: Iterable[tuple[str, np.ndarray]], table: Table, dtype: Any) -> dict[str, Any]:
    """A parameter pytree of float tensors; those whose spec has no dtype take ``dtype``."""
    params: dict[str, Any] = {}
    for name, value in tensors:
        spec = table[name]
        kept = dtype if spec.dtype is None else spec.dtype
        insert(params, spec.path, to_device(value.astype(kept, copy=False).reshape(spec.shape)))
    return params


def to_device(value: np.ndarray) -> jax.Array:
    """A device array with memory of its own, which does not change or vanish with the file ``value`` may be mapped to.

    ``jnp.asarray`` would copy twice.
    """
    return jax.device_put(value, may_alias=False)


def check_finite(params: Mapping[str, Any], source: str) -> None:
    """Raises ValueError if a float array holds NaN or infinity; one of them would silently spoil every token."""
    for path, x in jax.tree.leaves_with_path(params):
        # A part at a time: a whole embedding would have to be on the device for it.
        rows = x.reshape(-1, x.shape[-1])
        if not all(bool(all_finite(rows[i : i + CHECKED_ROWS])) for i in range(0, len(rows), CHECKED_ROWS)):
            raise ValueError(f"{source}: {jax.tree_util.keystr(path)} holds NaN or infinity; the checkpoint is damaged")


def _part_name(name: str, part: str) -> str:
    return f"{name.removesuffix('.weight')}.{part}"


def _group_size(block: Mapping[str, Any], spec: TensorSpec, k: int, source: str) -> int:
    size = block["group_sizes"].get(spec.module)
    if not isinstance(size, int) or isinstance(size, bool) or size < 2 or k % size or size % 2:
        raise ValueError(f"{source}: group_sizes has {size!r} for {spec.module}, which has {k} inputs")
    return size


def _read_recipe(block: Any, source: str) -> Recipe:
    if not isinstance(block, Mapping):
        raise ValueError(f"{source}: the fireq block of config.json must be an object, not {block!r}")
    if (found := block.get("format_version")) != FORMAT_VERSION:
        raise ValueError(
            f"{source}: checkpoint format {found!r} was written by fireq-jax "
            f"{block.get('library_version', 'of unknown version')}; this version reads format {FORMAT_VERSION}"
        )
    if missing := [key for key in _BLOCK if key not in block]:
        raise ValueError(f"{source}: the fireq block of config.json lacks {', '.join(missing)}")
    if block["layout"] != LAYOUT:
        raise ValueError(f"{source}: layout {block['layout']!r} is unknown; this version reads {LAYOUT!r}")
    if not isinstance(block["group_sizes"], Mapping) or not isinstance(block["recipe"], Mapping):
        raise ValueError(f"{source}: group_sizes and recipe of the fireq block must be objects")
    settings = dict(block["recipe"])
    known = {field.name for field in fields(Recipe)}
    if settings.keys() != known:
        raise ValueError(f"{source}: the recipe has the fields {sorted(settings)}, expected {sorted(known)}")
    if isinstance(settings["group_size"], list):
        settings["group_size"] = tuple(settings["group_size"])
    return Recipe(**settings)

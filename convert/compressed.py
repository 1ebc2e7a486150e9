"""Exchange with vLLM and transformers: checkpoints of the compressed-tensors package in its "pack-quantized" format.

Of a weight ``NAME.weight``, ``[n, k]``, they hold ``NAME.weight_packed`` (int32 ``[n, k / 8]``; code + 8 of element i
in the four bits from 4 (i mod 8) on), ``NAME.weight_scale`` (``[n, k / g]``) and ``NAME.weight_shape`` (int64, n and
k): ``W = codes · scales``. What activations are rounded to is in ``config.json`` under ``quantization_config``.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from convert import native
from convert.folder import staged, write_json
from convert.safetensors_file import StoredTensor
from convert.shards import write_shards
from convert.tensors import Table, TensorSpec, check_tensors, insert, lookup
from fireq_jax.config import LlamaConfig, Recipe
from fireq_jax.llama import Llama
from fireq_jax.qtensor import ByteWeight, Int4Weight, Layout, is_int4, to_layout
from fireq_jax.quantize import pick_group_size, recipe_of

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_SCALE_DTYPES = ("bfloat16", "float16", "float32")
_BEHIND_ROPE = ("post_rope_scale", "key_offset")
# What vLLM's kernels for int4 weights and e4m3 activations take.
_W4A8_GROUP, _W4A8_MULTIPLE = 128, 128


def export_compressed_tensors(
    folder: str | Path,
    model: Llama,
    params: Mapping[str, Any],
    *,
    activations: Literal["fp8", "none"] | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Writes quantised parameters as vLLM and transformers read them.

    Codes and scales are stored without a change (a sigma_fp8 scale times its tensor scale is exact in bf16).
    Channel-wise smoothing and rotated values are part of the weights. What is applied to rotated queries and keys
    (scales, offset, rotation) is left out: it cancels in the scores and only helps an int4 cache, which the format does
    not know; the reader's cache is its own choice. "folded" numerics are left out, too: how a product is computed is
    the reader's choice. Group scales may be negative, which the format allows.

    Args:
      folder: where to write.
      model: the model the parameters belong to.
      params: quantised parameters.
      activations: "fp8" declares e4m3 activations per token (W4A8, vLLM's Hopper kernels), "none" leaves them alone
        (W4A16); None takes what the parameters were made for.
      tokenizer: a transformers tokenizer to store beside them.
      overwrite: replace a folder that exists.

    Raises:
      FileExistsError: the folder exists, is not empty, and ``overwrite`` is False.
      ValueError: there is no int4 weight, or "fp8" is asked for and a weight has groups other than 128 or sizes that
        are no multiple of 128, which vLLM does not take.
    """
    recipe = recipe_of(params)
    weights = [x for x in jax.tree.leaves(params, is_leaf=is_int4) if is_int4(x)]
    if recipe is None or not weights:
        raise ValueError("params hold no int4 weights; quantize them first")
    if model.config.rope.kind == "factors":
        raise ValueError("transformers knows no rope_type with a factor per frequency; load the model from safetensors")
    activations = recipe.activations if activations is None else activations
    if activations not in ("fp8", "none"):
        raise ValueError(f"{activations=} must be 'fp8' or 'none'")
    separate_head = lookup(params, ("lm_head", "kernel")) is not None
    table = native.full_table(model.config, separate_head, lambda spec: False)
    arrays: dict[str, Any] = {}
    modules: dict[int, list[str]] = {}
    for name, spec in table.items():
        value = lookup(params, spec.path)
        if isinstance(value, ByteWeight):  # the format's 8-bit weights go with activations of the same kind
            arrays[name] = value.dequantize(model.dtype).reshape(spec.stored_shape)
            continue
        if not is_int4(value):
            arrays |= native.named_arrays([spec], params)
            continue
        if activations == "fp8":
            _check_w4a8(name, spec.stored_shape, value.group_size)
        arrays |= dict(zip(_part_names(name), _pack(value.rows, spec, name), strict=True))
        modules.setdefault(value.group_size, []).append(name.removesuffix(".weight"))
    floats = [spec for spec in table.values() if spec.input_axes and spec.name in arrays]
    config = model.config.to_hf() | {
        "dtype": jnp.dtype(model.dtype).name,
        "tie_word_embeddings": not separate_head,
        "quantization_config": _describe(modules, [spec.name.removesuffix(".weight") for spec in floats], activations),
    }
    with staged(Path(folder).expanduser().absolute(), overwrite=overwrite) as staging:
        write_shards(staging, arrays, {})
        write_json(staging / "config.json", config)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)


def load_compressed(
    config: LlamaConfig,
    settings: Any,
    tensors: Mapping[str, StoredTensor],
    float_dtype: Callable[[Table], Any],
    layout: Layout,
    source: str,
) -> tuple[Llama, dict[str, Any]]:
    """Model and parameters of a compressed-tensors checkpoint with symmetric int4 weights, W4A16 or W4A8 (e4m3).

    Its recipe has a float cache, as these checkpoints mean it. Scales that are not bf16 are rounded to it, with a
    warning if that changes them. A scale per output becomes one per group.

    Args:
      config: the model.
      settings: ``quantization_config`` of its ``config.json``.
      tensors: of all shards.
      float_dtype: picks the dtype of the unquantised weights from their table.
      layout: of the weights in the pytree, see :func:`fireq_jax.to_layout`.
      source: what errors call the checkpoint.

    Raises:
      ValueError: the checkpoint has another format, other bits, zero points, permuted groups, a quantised cache or
        on-line transforms; or tensors and settings contradict each other.
    """
    declared, activations = _read_settings(settings, source)
    if any(name.endswith((".weight_g_idx", ".weight_zero_point")) for name in tensors):
        raise ValueError(
            f"{source} has zero points or permuted groups (weight_g_idx), which this library does not compute"
        )
    head = _part_names("lm_head.weight")[0] in tensors
    if head and config.tie_word_embeddings:
        raise ValueError(f"{source}: lm_head is quantised although config.json ties it to the embedding")
    table = native.full_table(config, False, lambda spec: False)
    quantized = {name: spec for name, spec in table.items() if _part_names(name)[0] in tensors}
    if any(not spec.input_axes for spec in quantized.values()) or not quantized:
        raise ValueError(f"{source}: linear weights, and they alone, must be packed")
    floats = {name: spec for name, spec in table.items() if name not in quantized}
    expected: dict[str, tuple[int, ...]] = {name: spec.stored_shape for name, spec in floats.items()}
    for name, spec in quantized.items():
        (n, k), scales = spec.stored_shape, tensors.get(_part_names(name)[1])
        groups = 0 if scales is None or len(scales.shape) != 2 else scales.shape[1]
        allowed = {1 if size is None else k // size for size in declared if size is None or k % size == 0}
        if groups not in allowed:
            raise ValueError(
                f"{source}: {name} with {k} inputs has {groups} scales per output; config.json declares groups of "
                + ", ".join("all" if size is None else str(size) for size in declared)
            )
        expected |= dict(zip(_part_names(name), ((n, -(-k // 8)), (n, groups), (2,)), strict=True))
    check_tensors({name: x.shape for name, x in tensors.items()}, expected, [], source)
    dtype = float_dtype(floats)
    params = native.assemble(((name, tensors[name].read()) for name in floats), floats, dtype)
    native.check_finite(params, source)
    for name, spec in quantized.items():
        stored = [tensors[part].read() for part in _part_names(name)]
        weight = _unpack(*stored, spec=spec, activations=activations, source=f"{source}: {name}")
        insert(params, spec.path, to_layout(weight, layout))
    sizes = {lookup(params, spec.path).group_size for spec in quantized.values()}
    recipe = Recipe(
        METHOD, tuple(sorted(sizes, reverse=True)), "sigma_bf16",
        activations=activations, kv_cache="float", lm_head="int4" if "lm_head.weight" in quantized else "float",
    )  # fmt: skip
    return Llama(config, dtype), params | {"recipe": recipe}


def _part_names(name: str) -> list[str]:
    return [f"{name.removesuffix('.weight')}.{part}" for part in _PARTS]


def _check_w4a8(name: str, shape: tuple[int, ...], group_size: int) -> None:
    if group_size != _W4A8_GROUP or any(size % _W4A8_MULTIPLE for size in shape):
        raise ValueError(
            f"{name} is {shape} in groups of {group_size}; with e4m3 activations vLLM takes groups of {_W4A8_GROUP} "
            f"and sizes that are multiples of {_W4A8_MULTIPLE}. Pass activations='none' to write W4A16"
        )


def _pack(weight: Int4Weight, spec: TensorSpec, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words, bf16 scales and shape."""
    n, k = spec.stored_shape
    # Two's complement and code + 8 differ in the highest of the four bits.
    packed = np.pad(np.asarray(weight.codes) ^ np.uint8(0x88), ((0, 0), (0, -(k // 2) % 4)))
    exact = np.asarray(weight.scales).astype(np.float32) * np.float32(weight.tensor_scale)
    scales = exact.astype(ml_dtypes.bfloat16)
    if not np.array_equal(scales.astype(np.float32), exact):
        raise ValueError(f"{name}: its scales leave the range of bf16")
    return packed.view("<i4"), scales, np.array([n, k], np.int64)


def _unpack(
    packed: np.ndarray,
    scales: np.ndarray,
    shape: np.ndarray,
    *,
    spec: TensorSpec,
    activations: Literal["fp8", "none"],
    source: str,
) -> Int4Weight:
    n, k = spec.stored_shape
    if packed.dtype != np.int32 or shape.dtype != np.int64 or scales.dtype.name not in _SCALE_DTYPES:
        found = ", ".join(f"{x.dtype.name} {part}" for x, part in zip((packed, scales, shape), _PARTS, strict=True))
        raise ValueError(f"{source} has {found}; must be int32, one of {', '.join(_SCALE_DTYPES)}, int64")
    if shape.tolist() != [n, k] or k % 2:
        raise ValueError(f"{source} has weight_shape {shape.tolist()}, config.json asks for {[n, k]}")
    rounded = scales.astype(ml_dtypes.bfloat16)
    if not np.array_equal(rounded.astype(np.float32), scales.astype(np.float32)):
        warnings.warn(f"{source}: {scales.dtype.name} scales were rounded to bfloat16", stacklevel=2)
    if scales.shape[1] == 1:
        rounded = np.repeat(rounded, k // pick_group_size(k, Recipe(group_size=(128, 64, 32, 16, 8, 4, 2)), source), 1)
    weight = Int4Weight(
        native.to_device(np.ascontiguousarray(packed).view(np.uint8)[:, : k // 2] ^ np.uint8(0x88)),
        native.to_device(rounded),
        jnp.float32(1.0),
        out_shape=spec.shape[: -spec.input_axes],
        in_shape=spec.shape[-spec.input_axes :],
        activations=activations,
    )
    weight.validate(source)
    return weight


def _describe(modules: Mapping[int, list[str]], ignored: Iterable[str], activations: str) -> dict[str, Any]:
    """The ``quantization_config`` block."""
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(modules) == 1 else names,
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": size,
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": inputs if activations == "fp8" else None,
            "output_activations": None,
            "format": FORMAT,  # readers take it to be another one where activations are floats
        }
        for i, (size, names) in enumerate(sorted(modules.items(), reverse=True))
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(ignored),
        "kv_cache_scheme": None,
    }


def _read_settings(settings: Any, source: str) -> tuple[list[int | None], Literal["fp8", "none"]]:
    """The group sizes that are declared, None for a scale per output, and what activations are rounded to."""

    def need(condition: bool, what: str) -> None:
        if not condition:
            raise ValueError(f"{source}: quantization_config has {what}, which this library does not compute")

    need(settings.get("format") == FORMAT, f"format={settings.get('format')!r}")
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        need(not settings.get(key), f"{key}={settings.get(key)!r}")
    groups = settings.get("config_groups")
    need(isinstance(groups, Mapping) and bool(groups), f"config_groups={groups!r}")
    sizes: list[int | None] = []
    kinds: set[Literal["fp8", "none"]] = set()
    for scheme in groups.values():
        need(isinstance(scheme, Mapping) and isinstance(scheme.get("weights"), Mapping), f"the scheme {scheme!r}")
        weights = scheme["weights"]
        kind = tuple(weights.get(key) for key in ("num_bits", "type", "symmetric"))
        need(kind == (4, "int", True), f"weights of (num_bits, type, symmetric) = {kind}")
        strategy, size = weights.get("strategy"), weights.get("group_size")
        need(strategy in ("group", "channel"), f"weights with strategy={strategy!r}")
        need(strategy == "channel" or (isinstance(size, int) and size > 0 and size % 2 == 0), f"group_size={size!r}")
        sizes.append(None if strategy == "channel" else size)
        need(not scheme.get("output_activations"), f"output_activations={scheme.get('output_activations')!r}")
        kinds.add(_activations(scheme.get("input_activations"), need))
    need(len(kinds) == 1, "some activations in e4m3 and some not")
    return sizes, kinds.pop()


def _activations(inputs: Any, need: Callable[[bool, str], None]) -> Literal["fp8", "none"]:
    if inputs is None:
        return "none"
    need(isinstance(inputs, Mapping), f"input_activations={inputs!r}")
    kind = tuple(inputs.get(key) for key in ("num_bits", "type", "strategy", "dynamic"))
    need(kind == (8, "float", "token", True), f"activations of (num_bits, type, strategy, dynamic) = {kind}")
    return "fp8"

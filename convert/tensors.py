"""The one table between Hugging Face tensor names and the parameter pytree."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fireq_jax.config import LlamaConfig

_LAYER = re.compile(r"model\.layers\.\d+\.")
# Buffers that old checkpoints carry and that follow from the config.
_DERIVED = re.compile(r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint.

    Attributes:
      name: Hugging Face name.
      path: keys into the parameter pytree.
      stored_shape: shape in the checkpoint.
      shape: shape in the pytree; the same elements in the same order, heads on an axis of their own.
      input_axes: trailing axes of a linear weight that are inputs; 0 for everything else.
      dtype: what the tensor is, whatever the model's dtype; None follows the model.
    """

    name: str
    path: tuple[str, ...]
    stored_shape: tuple[int, ...]
    shape: tuple[int, ...]
    input_axes: int = 0
    dtype: Any = None

    @property
    def module(self) -> str:
        """What kind of weight it is: its name without the layer and ``.weight``, e.g. ``self_attn.q_proj``."""
        return _LAYER.sub("", self.name).removesuffix(".weight")


Table = dict[str, TensorSpec]


def tensor_table(config: LlamaConfig) -> Table:
    """Every tensor a checkpoint of this model must hold, by Hugging Face name."""
    hidden, wide, d = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = (config.num_heads, d), (config.num_kv_heads, d)
    # Hugging Face module, our module, output axes, input axes, has a bias
    linears = (
        ("self_attn.q_proj", ("attention", "q"), queries, (hidden,), config.attention_bias),
        ("self_attn.k_proj", ("attention", "k"), keys, (hidden,), config.attention_bias),
        ("self_attn.v_proj", ("attention", "v"), keys, (hidden,), config.attention_bias),
        ("self_attn.o_proj", ("attention", "o"), (hidden,), queries, config.attention_bias),
        ("mlp.gate_proj", ("mlp", "gate"), (wide,), (hidden,), config.mlp_bias),
        ("mlp.up_proj", ("mlp", "up"), (wide,), (hidden,), config.mlp_bias),
        ("mlp.down_proj", ("mlp", "down"), (hidden,), (wide,), config.mlp_bias),
    )
    norms = (("input_layernorm", "input_norm"), ("post_attention_layernorm", "post_attention_norm"))

    def flat(axes: tuple[int, ...]) -> int:
        return axes[0] if len(axes) == 1 else axes[0] * axes[1]

    embedding = (config.vocab_size, hidden)
    specs = [TensorSpec("model.embed_tokens.weight", ("embed", "embedding"), embedding, embedding)]
    for i in range(config.num_layers):
        prefix, layer = f"model.layers.{i}", f"layers_{i}"
        for theirs, ours in norms:
            specs.append(TensorSpec(f"{prefix}.{theirs}.weight", (layer, ours, "scale"), (hidden,), (hidden,)))
        for theirs, path, out_axes, in_axes, has_bias in linears:
            matrix = (flat(out_axes), flat(in_axes))
            kernel = (layer, *path, "kernel")
            specs.append(TensorSpec(f"{prefix}.{theirs}.weight", kernel, matrix, out_axes + in_axes, len(in_axes)))
            if has_bias:
                bias = (layer, *path, "bias")
                specs.append(TensorSpec(f"{prefix}.{theirs}.bias", bias, (flat(out_axes),), out_axes))
    specs.append(TensorSpec("model.norm.weight", ("final_norm", "scale"), (hidden,), (hidden,)))
    if not config.tie_word_embeddings:
        specs.append(TensorSpec("lm_head.weight", ("lm_head", "kernel"), embedding, embedding, 1))
    return {spec.name: spec for spec in specs}


def is_ignorable(name: str, config: LlamaConfig) -> bool:
    """Whether a tensor may be in a checkpoint although the model does not need it."""
    return bool(_DERIVED.fullmatch(name)) or (config.tie_word_embeddings and name == "lm_head.weight")


def check_layers(config: LlamaConfig, tensors: int, source: str) -> None:
    """Raises ValueError if so many tensors cannot be enough, before anything as long as ``num_layers`` is made."""
    if config.num_layers > tensors:
        raise ValueError(f"{source} speaks of {config.num_layers} layers, it holds {tensors} tensors")


def check_tensors(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    ignorable: Iterable[str],
    source: str,
) -> None:
    """Compares names and shapes and reports everything that is wrong at once.

    Args:
      found: shapes in the checkpoint, by name.
      expected: shapes the model needs, by name.
      ignorable: names that may be there all the same.
      source: what the error calls the checkpoint.

    Raises:
      ValueError: tensors are missing, unexpected or of the wrong shape.
    """
    ignored = set(ignorable)
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys() - ignored),
        "of the wrong shape": [
            f"{name} (is {tuple(found[name])}, must be {shape})"
            for name, shape in expected.items()
            if name in found and tuple(found[name]) != shape
        ],
    }
    if any(problems.values()):
        lines = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
        raise ValueError(f"{source} does not hold the tensors its config asks for:\n  " + "\n  ".join(lines))


def _some(names: list[str], most: int = 12) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def insert(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Puts ``value`` at ``path`` into nested dicts, making those that lack."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def lookup(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The value at ``path``, or None."""
    node: Any = tree
    for key in path:
        if not isinstance(node, Mapping) or key not in node:
            return None
        node = node[key]
    return node

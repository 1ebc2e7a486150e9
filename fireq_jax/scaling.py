"""Exact rescalings of a float Llama: each moves magnitude between tensors and leaves the logits as they are.

A transform takes one decoder block's float parameters and returns new ones; nothing is modified. With an input ``x``
and a weight ``W``, ``(x / s) · (W · s)ᵀ = x · Wᵀ``: s goes into the weight's columns, 1 / s into whatever made x. After
FireQ (arXiv 2505.20839); where its published code folds a scale that is no equivalence (the value/output pair averages
four neighbouring channels instead of the query group's), the equivalence is computed here.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fireq_jax.compiling import jit_untuned
from pallas_kernels import hadamard

Layer = dict[str, Any]
Factors = dict[tuple[str, ...], jax.Array]


def _scaled(layer: Mapping[str, Any], factors: Factors) -> Layer:
    """A copy of the nested dicts with the leaf at each path multiplied, in float32, by a factor that broadcasts."""

    def visit(node: Any, path: tuple[str, ...]) -> Any:
        if isinstance(node, Mapping):
            return {key: visit(value, (*path, key)) for key, value in node.items()}
        if path in factors:
            return (node.astype(jnp.float32) * factors[path]).astype(node.dtype)
        return node

    return visit(layer, ())


def per_query_head(layer: Mapping[str, Any], per_kv_head: jax.Array) -> jax.Array:
    """``[kv heads, d]`` -> ``[heads, d]``: every query head takes the values of its key/value head."""
    heads = layer["attention"]["q"]["kernel"].shape[0]
    return jnp.repeat(per_kv_head, heads // per_kv_head.shape[0], axis=0)


def scale_attention_input(layer: Mapping[str, Any], s: jax.Array) -> Layer:
    """Divides the input of q, k and v by s, ``[hidden]`` and non-zero; folded into the norm before them."""
    factors: Factors = {("attention", name, "kernel"): s for name in "qkv"}
    return _scaled(layer, {**factors, ("input_norm", "scale"): 1 / s})


def scale_mlp_input(layer: Mapping[str, Any], s: jax.Array) -> Layer:
    """Divides the input of gate and up by s, ``[hidden]`` and non-zero; folded into the norm before them."""
    factors: Factors = {("mlp", name, "kernel"): s for name in ("gate", "up")}
    return _scaled(layer, {**factors, ("post_attention_norm", "scale"): 1 / s})


def scale_values(layer: Mapping[str, Any], s: jax.Array) -> Layer:
    """Divides the value channels, and so the input of o, by s, ``[kv heads, head_dim]`` and non-zero.

    All query heads of a kv head read the same values, so in o they share its s.
    """
    return _scaled(
        layer,
        {
            ("attention", "v", "kernel"): 1 / s[..., None],
            ("attention", "v", "bias"): 1 / s,
            ("attention", "o", "kernel"): per_query_head(layer, s),
        },
    )


def scale_mlp_hidden(layer: Mapping[str, Any], s: jax.Array) -> Layer:
    """Divides the input of down by s, ``[intermediate]`` and non-zero; folded into up, which enters it linearly."""
    return _scaled(
        layer,
        {
            ("mlp", "up", "kernel"): 1 / s[:, None],
            ("mlp", "up", "bias"): 1 / s,
            ("mlp", "down", "kernel"): s,
        },
    )


def rotate_values(layer: Mapping[str, Any]) -> Layer:
    """Mixes each head's value channels by a Hadamard matrix, folded into v, and undoes it in o.

    One channel of large magnitude no longer sets the int4 step of the others.
    """
    attention = layer["attention"]
    rotation = jnp.asarray(hadamard(attention["v"]["kernel"].shape[1]))
    v = {**attention["v"], "kernel": rotated("hdi,de->hei", attention["v"]["kernel"], rotation)}
    if "bias" in v:
        v["bias"] = rotated("hd,de->he", v["bias"], rotation)
    o = {**attention["o"], "kernel": rotated("ohd,de->ohe", attention["o"]["kernel"], rotation)}
    return {**layer, "attention": {**attention, "v": v, "o": o}}


@partial(jit_untuned, static_argnums=0)
def rotated(equation: str, x: jax.Array, *rotations: jax.Array) -> jax.Array:
    """``jnp.einsum(equation, x, *rotations)`` in float32, in x's type."""
    out = jnp.einsum(equation, x.astype(jnp.float32), *rotations, precision=jax.lax.Precision.HIGHEST)
    return out.astype(x.dtype)


def scale_keys_before_rope(layer: Mapping[str, Any], n: jax.Array) -> Layer:
    """Divides keys by n before the rotation and multiplies queries by it.

    Args:
      layer: one decoder block.
      n: ``[kv heads, head_dim / 2]``, non-zero; both channels of a rotated pair take the same value, so that the
        scale commutes with the rotation.
    """
    both = jnp.concatenate([n, n], axis=-1)
    queries = per_query_head(layer, both)
    return _scaled(
        layer,
        {
            ("attention", "k", "kernel"): 1 / both[..., None],
            ("attention", "k", "bias"): 1 / both,
            ("attention", "q", "kernel"): queries[..., None],
            ("attention", "q", "bias"): queries,
        },
    )


def scale_keys_after_rope(layer: Mapping[str, Any], s: jax.Array) -> Layer:
    """Divides keys by s after the rotation and multiplies queries by it, on line.

    Channels of a pair may differ, so this cannot be folded into weights: the block gets a leaf
    ``attention/post_rope_scale`` that the model applies, through its cosines and sines, as it rotates.

    Args:
      layer: one decoder block.
      s: ``[kv heads, head_dim]``, non-zero.
    """
    before = layer["attention"].get("post_rope_scale", 1.0)
    attention = {**layer["attention"], "post_rope_scale": (s * before).astype(jnp.float32)}
    return {**layer, "attention": attention}


def rotate_keys_after_rope(layer: Mapping[str, Any], offset: jax.Array) -> Layer:
    """Subtracts a constant from the rotated, scaled keys and mixes their channels by a Hadamard matrix, on line.

    Queries are mixed, too, so that scores keep their value up to the query's product with the offset. That is the same
    for all keys, and softmax does not see it. The block gets the leaf ``attention/key_offset``; where there is one,
    channels are mixed.

    Args:
      layer: one decoder block.
      offset: ``[kv heads, head_dim]``, of keys behind :func:`scale_keys_after_rope`.
    """
    return {**layer, "attention": {**layer["attention"], "key_offset": offset.astype(jnp.float32)}}

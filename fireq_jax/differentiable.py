"""A Llama in float32 that can be differentiated, over whole windows and without a cache.

Weights are float or quantised; activations, keys and values are rounded as at run time, and the gradient takes each
rounding for the identity. The refinement and the curvature of the loss are computed with it.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from fireq_jax.config import LlamaConfig, Recipe
from fireq_jax.layers import rope_tables
from fireq_jax.qtensor import ByteWeight, Int4Weight
from pallas_kernels import apply_ropes, quantize_fp8, quantize_kv, unpack_int4

Params = dict[str, Any]


def stacked(params: Mapping[str, Any], names: list[str]) -> Params:
    """The model with its blocks stacked along a new first axis, so that one compiled block serves all."""
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return {**ends(params), "blocks": blocks}


def ends(params: Mapping[str, Any]) -> Params:
    """What comes before and behind the blocks: ``embedding``, ``final_norm`` and ``head``."""
    embedding = params["embed"]["embedding"]
    head = params["lm_head"]["kernel"] if "lm_head" in params else embedding
    return {"embedding": embedding, "final_norm": params["final_norm"], "head": head}


def log_probabilities(config: LlamaConfig, recipe: Recipe | None, model: Params, tokens: jax.Array) -> jax.Array:
    """``[windows, window, vocab]`` float32, differentiable; ``recipe`` None for the float model."""
    x = model["embedding"][tokens].astype(jnp.float32)
    block = jax.checkpoint(partial(block_output, config, recipe))
    x, _ = jax.lax.scan(lambda x, layer: (block(layer, x), None), x, model["blocks"])
    return predictions(config, recipe, model, x)


def predictions(config: LlamaConfig, recipe: Recipe | None, model: Params, x: jax.Array) -> jax.Array:
    """:func:`log_probabilities` of the last block's output; of ``model`` the :func:`ends` are read."""
    return jax.nn.log_softmax(_linear(recipe, {"kernel": model["head"]}, _norm(config, model["final_norm"], x)))


def _straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    return x + jax.lax.stop_gradient(rounded - x)


def _as_fp8(x: jax.Array) -> jax.Array:
    codes, scale = quantize_fp8(jax.lax.stop_gradient(x))
    return _straight_through(x, codes.astype(jnp.float32) * scale[..., None])


def _as_cached(x: jax.Array) -> jax.Array:
    codes, scale = quantize_kv(jax.lax.stop_gradient(x))
    return _straight_through(x, unpack_int4(codes).astype(jnp.float32) * scale.astype(jnp.float32)[..., None])


def _norm(config: LlamaConfig, params: Params, x: jax.Array) -> jax.Array:
    normed = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + config.rms_norm_eps)
    return normed * params["scale"].astype(jnp.float32)


def _linear(recipe: Recipe | None, params: Params, x: jax.Array) -> jax.Array:
    """``[..., k] -> [..., n]``; heads are flattened on both sides. An ``"error"`` of the output is added to it."""
    kernel = params["kernel"]
    if isinstance(kernel, Int4Weight) and recipe is not None and recipe.activations == "fp8":
        x = _as_fp8(x)
    if isinstance(kernel, Int4Weight | ByteWeight):
        kernel = kernel.dequantize()
    y = jnp.matmul(x, kernel.astype(jnp.float32).reshape(-1, x.shape[-1]).T)
    if "bias" in params:
        y = y + params["bias"].astype(jnp.float32).reshape(-1)
    return y + params["error"] if "error" in params else y


def block_output(config: LlamaConfig, recipe: Recipe | None, layer: Params, x: jax.Array) -> jax.Array:
    """One decoder block over whole windows, ``[windows, window, hidden]``, as the model computes it through its cache.

    Args:
      config: the model.
      recipe: how activations, keys and values are rounded; None for not at all.
      layer: its parameters. A projection may hold an ``"error"``, ``[windows, window, n]``, which is added to its
        output.
      x: its input, float32.
    """
    b, t, _ = x.shape
    attention, mlp = layer["attention"], layer["mlp"]
    kv_heads, d = config.num_kv_heads, config.head_dim
    group = config.num_heads // kv_heads
    normed = _norm(config, layer["input_norm"], x)
    q, k, v = (_linear(recipe, attention[name], normed).reshape(b, t, -1, d) for name in "qkv")
    rope = rope_tables(config, jnp.arange(t)[None])
    q, k = apply_ropes(q, k, *rope, attention.get("post_rope_scale"), attention.get("key_offset"))
    if recipe is not None and recipe.kv_cache == "int4":
        q, k, v = _as_fp8(q), _as_cached(k), _as_cached(v)
    scores = jnp.einsum("btkgd,bskd->bkgts", q.reshape(b, t, kv_heads, group, d), k) * d**-0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
    attended = jnp.einsum("bkgts,bskd->btkgd", jax.nn.softmax(scores), v).reshape(b, t, -1)
    x = x + _linear(recipe, attention["o"], attended)
    normed = _norm(config, layer["post_attention_norm"], x)
    gated = jax.nn.silu(_linear(recipe, mlp["gate"], normed)) * _linear(recipe, mlp["up"], normed)
    return x + _linear(recipe, mlp["down"], gated)

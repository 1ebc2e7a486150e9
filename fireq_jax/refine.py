"""A last step behind rounding: the quantised model's gains are tuned until it predicts more like the float model.

What is trained is small and costs nothing at run time: the gains of the RMS norms and the scales that the rotation
applies to queries and keys. Codes and group scales stay; training those on a text as short as a calibration's was
measured to carry over to other texts less well.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fireq_jax.config import LlamaConfig, Recipe
from fireq_jax.layers import rope_tables
from fireq_jax.qtensor import ByteWeight, Int4Weight
from pallas_kernels import apply_ropes, quantize_fp8, quantize_kv, unpack_int4

Params = dict[str, Any]
EPOCHS = 3
WINDOWS_PER_STEP = 4
LEARNING_RATE = 1e-3


def refinement_steps(tokens: np.ndarray) -> int:
    """How many steps :func:`refine_gains` takes on ``[windows, window]`` tokens."""
    return EPOCHS * -(-len(tokens) // WINDOWS_PER_STEP)


def refine_gains(
    config: LlamaConfig,
    params: Mapping[str, Any],
    quantized: Mapping[str, Any],
    tokens: np.ndarray,
    recipe: Recipe,
    progress: Callable[[int], None] | None = None,
) -> Params:
    """Minimises ``KL(float model || quantised model)`` over a text by Adam, rounding straight-through.

    Every gain g becomes ``g · exp(δ)`` and δ is trained, with a learning rate that falls from ``LEARNING_RATE`` to 0
    along a cosine. Activations, keys and values are rounded as at run time; the gradient takes each rounding for the
    identity. Blocks are recomputed in the backward pass. Memory: both models, one block's float weights, and the
    hidden states and two arrays of logits of ``WINDOWS_PER_STEP`` windows.

    Args:
      config: the model.
      params: its float parameters.
      quantized: the same, quantised.
      tokens: ``[windows, window]`` int32.
      recipe: of ``quantized``.
      progress: called with the steps done.

    Returns:
      ``quantized`` with refined gains.
    """
    # By number: a pytree that went through jax.tree.map has "layers_10" before "layers_2".
    names = [f"layers_{i}" for i in range(config.num_layers)]
    float_model, rounded_model = _stacked(params, names), _stacked(quantized, names)
    deltas = jax.tree.map(jnp.zeros_like, _gains(rounded_model))
    steps = refinement_steps(tokens)
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    state = optimizer.init(deltas)
    order = np.random.default_rng(0)
    done = 0
    for _ in range(EPOCHS):
        shuffled = order.permutation(len(tokens))
        for start in range(0, len(tokens), WINDOWS_PER_STEP):
            batch = jnp.asarray(tokens[shuffled[start : start + WINDOWS_PER_STEP]])
            deltas, state = _step(config, recipe, optimizer.update, float_model, rounded_model, deltas, state, batch)
            done += 1
            if progress is not None:
                progress(done)
    refined = _with_gains(rounded_model, deltas)
    result = {**quantized, "final_norm": refined["final_norm"]}
    for i, name in enumerate(names):
        gains = jax.tree.map(lambda x, i=i: x[i], _gains(refined)["blocks"])
        layer = quantized[name]
        attention = {**layer["attention"], **{key: gains[key] for key in gains.keys() & {"post_rope_scale"}}}
        norms = {key: {"scale": gains[key]} for key in ("input_norm", "post_attention_norm")}
        result[name] = {**layer, **norms, "attention": attention}
    return result


def _stacked(params: Mapping[str, Any], names: list[str]) -> Params:
    """The model with its blocks stacked along a new first axis, so that one compiled block serves all."""
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    head = params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"]
    embedding = params["embed"]["embedding"]
    return {"embedding": embedding, "blocks": blocks, "final_norm": params["final_norm"], "head": head}


def _gains(model: Params) -> Params:
    blocks = model["blocks"]
    gains = {name: blocks[name]["scale"] for name in ("input_norm", "post_attention_norm")}
    if "post_rope_scale" in blocks["attention"]:
        gains["post_rope_scale"] = blocks["attention"]["post_rope_scale"]
    return {"blocks": gains, "final_norm": model["final_norm"]["scale"]}


def _with_gains(model: Params, deltas: Params) -> Params:
    def scaled(gain: jax.Array, delta: jax.Array) -> jax.Array:
        return (gain.astype(jnp.float32) * jnp.exp(delta)).astype(gain.dtype)

    gains = jax.tree.map(scaled, _gains(model), deltas)
    blocks = dict(model["blocks"])
    for name in ("input_norm", "post_attention_norm"):
        blocks[name] = {"scale": gains["blocks"][name]}
    if "post_rope_scale" in gains["blocks"]:
        blocks["attention"] = {**blocks["attention"], "post_rope_scale": gains["blocks"]["post_rope_scale"]}
    return {**model, "blocks": blocks, "final_norm": {"scale": gains["final_norm"]}}


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(5, 6))
def _step(
    config: LlamaConfig,
    recipe: Recipe,
    update: Callable[..., Any],
    float_model: Params,
    rounded_model: Params,
    deltas: Params,
    state: Any,
    batch: jax.Array,
) -> tuple[Params, Any]:
    target = jax.lax.stop_gradient(_log_probabilities(config, None, float_model, batch))

    def loss(deltas: Params) -> jax.Array:
        predicted = _log_probabilities(config, recipe, _with_gains(rounded_model, deltas), batch)
        return jnp.mean(jnp.sum(jnp.exp(target) * (target - predicted), axis=-1))

    updates, state = update(jax.grad(loss)(deltas), state, deltas)
    return optax.apply_updates(deltas, updates), state


def _log_probabilities(config: LlamaConfig, recipe: Recipe | None, model: Params, tokens: jax.Array) -> jax.Array:
    """``[windows, window, vocab]`` float32, differentiable; ``recipe`` None for the float model."""
    x = model["embedding"][tokens].astype(jnp.float32)
    block = jax.checkpoint(partial(_block, config, recipe))
    x, _ = jax.lax.scan(lambda x, layer: (block(layer, x), None), x, model["blocks"])
    x = _norm(config, model["final_norm"], x)
    return jax.nn.log_softmax(_linear(recipe, {"kernel": model["head"]}, x))


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
    """``[..., k] -> [..., n]``; heads are flattened on both sides."""
    kernel = params["kernel"]
    if isinstance(kernel, Int4Weight) and recipe is not None and recipe.activations == "fp8":
        x = _as_fp8(x)
    if isinstance(kernel, Int4Weight | ByteWeight):
        kernel = kernel.dequantize()
    y = jnp.matmul(x, kernel.astype(jnp.float32).reshape(-1, x.shape[-1]).T)
    return y + params["bias"].astype(jnp.float32).reshape(-1) if "bias" in params else y


def _block(config: LlamaConfig, recipe: Recipe | None, layer: Params, x: jax.Array) -> jax.Array:
    """One decoder block over whole windows, as the model computes it through its cache."""
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

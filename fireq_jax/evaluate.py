"""How much quantisation changes a model: perplexity, divergence from the float model, agreement."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.compiling import jit_untuned
from fireq_jax.kv_cache import CacheKind, empty_layer_cache
from fireq_jax.layers import AttentionMode, DecoderBlock, rope_tables
from fireq_jax.llama import Llama
from fireq_jax.quantize import layer_names, recipe_of

Through = Literal["cache", "prefill"]


@dataclass(frozen=True)
class Evaluation:
    """Averages over the scored tokens of a text.

    Attributes:
      perplexity: exp of the mean negative log-likelihood per token.
      reference_perplexity: that of the reference; None without one.
      kl: mean Kullback-Leibler divergence KL(reference || model) of the next-token distributions, in nats per
        token; None without a reference.
      top1_agreement: share of positions at which both models find the same token most likely; None without a
        reference.
      scored_tokens: tokens whose likelihood was measured.
      windows: how many windows the text was cut into.
      window: tokens per window; every window starts without context.
      stride: tokens from the start of one window to that of the next. With stride < window only the tokens that
        no earlier window scored are scored, so each has at least window - stride tokens of context.
      keys_values: "float" for unquantised attention; else the recipe's kind of cache and whether attention read
        from it ("cache") or from fresh values as a prompt does ("prefill").
    """

    perplexity: float
    reference_perplexity: float | None
    kl: float | None
    top1_agreement: float | None
    scored_tokens: int
    windows: int
    window: int
    stride: int
    keys_values: str

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain Python values."""
        return asdict(self)


def evaluate(
    model: Llama,
    params: Mapping[str, Any],
    tokens: np.ndarray | list[int],
    *,
    reference: Mapping[str, Any] | None = None,
    window: int = 1024,
    stride: int | None = None,
    through: Through = "cache",
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores a text with a model, and compares with a float reference.

    By default every key and value of a quantised model passes through the cache its recipe names before it is
    attended to, so that the numbers speak for token-by-token decoding.

    Args:
      model: the Llama.
      params: the parameters to judge, float or quantised.
      tokens: the text, at least two token ids.
      reference: float parameters to compare with.
      window: tokens per window; shortened to the text if that is shorter.
      stride: step between windows; the window if None.
      through: "cache", or "prefill" to attend to fresh keys and values as a prompt does.
      progress: called with (windows done, windows in all).

    Returns:
      An :class:`Evaluation`.

    Raises:
      ValueError: the text is too short, a token is outside the vocabulary, or window and stride do not fit the
        model or each other.
    """
    ids = np.asarray(tokens, np.int32)
    config = model.config
    if ids.ndim != 1 or ids.size < 2:
        raise ValueError(f"the text has {ids.size} tokens; at least 2 are needed to predict one from another")
    config.check_tokens(ids)
    if not 2 <= window <= config.max_positions:
        raise ValueError(f"{window=} must be between 2 and the model's {config.max_positions} positions")
    window = min(window, ids.size)
    stride = window if stride is None else min(stride, window)
    if stride < 1:
        raise ValueError(f"{stride=} must be at least 1")

    recipe = recipe_of(params)
    if through not in ("cache", "prefill"):
        raise ValueError(f"{through=} must be 'cache' or 'prefill'")
    starts = [0]
    # A window's first token is only context, so one that has nothing else to add is not begun.
    while max(starts[-1] + stride + 1, starts[-1] + window) < ids.size:
        starts.append(starts[-1] + stride)
    totals = np.zeros(5)
    scored_to = 1  # the first token of a text has no context to be predicted from
    for index, start in enumerate(starts):
        end = min(start + window, ids.size)
        padded = np.zeros((1, window), np.int32)
        padded[0, : end - start] = ids[start:end]
        targets = start + 1 + np.arange(window - 1)
        weights = (targets < end) & (targets >= scored_to)
        length = np.full(1, end - start, np.int32)
        x = final_hidden(model, params, padded, length, through)
        reference_x = None if reference is None else final_hidden(model, reference, padded, length, through)
        ends, reference_ends = end_parameters(params), None if reference is None else end_parameters(reference)
        totals += _score(
            model, ends, reference_ends, x, reference_x, jnp.asarray(padded), jnp.asarray(weights, jnp.float32)
        )
        scored_to = end
        if progress is not None:
            progress(index + 1, len(starts))
    nll, reference_nll, kl, agreement, count = totals
    return Evaluation(
        perplexity=float(np.exp(nll / count)),
        reference_perplexity=None if reference is None else float(np.exp(reference_nll / count)),
        kl=None if reference is None else float(kl / count),
        top1_agreement=None if reference is None else float(agreement / count),
        scored_tokens=int(count),
        windows=len(starts),
        window=window,
        stride=stride,
        keys_values="float" if recipe is None else f"{recipe.kv_cache}, {through}",
    )


def final_hidden(
    model: Llama, params: Mapping[str, Any], tokens: np.ndarray, lengths: np.ndarray, through: Through = "cache"
) -> jax.Array:
    """What the last block puts out for sequences from their start, computed one block at a time.

    One compiled block serves all layers, and every recipe whose weights have the same layout.

    Args:
      model: the Llama.
      params: float or quantised parameters.
      tokens: ``[batch, t]`` int32, padded on the right.
      lengths: ``[batch]`` int32, real tokens per row.
      through: as for :func:`evaluate`.

    Returns:
      ``[batch, t, hidden]``, for ``model.apply(..., method="logits")`` with :func:`end_parameters`.
    """
    recipe = recipe_of(params)
    kind = None if recipe is None else recipe.kv_cache
    x = _embed(model, params["embed"]["embedding"], tokens)
    for name in layer_names(params):
        x = _apply_block(model, params[name], x, jnp.asarray(lengths), kind, through)
    return x


def end_parameters(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters outside the blocks."""
    return {name: params[name] for name in ("embed", "final_norm", "lm_head") if name in params}


@partial(jax.jit, static_argnums=0)
def _embed(model: Llama, embedding: jax.Array, tokens: jax.Array) -> jax.Array:
    return embedding[tokens].astype(model.dtype)


@partial(jit_untuned, static_argnums=(0, 4, 5))
def _apply_block(
    model: Llama,
    layer: Mapping[str, Any],
    x: jax.Array,
    lengths: jax.Array,
    kind: CacheKind | None,
    through: Through,
) -> jax.Array:
    """One block over sequences that start at position 0; ``kind`` is that of the cache, None for none."""
    block = DecoderBlock(model.config, model.dtype, model.implementation)
    cache = None if kind is None else empty_layer_cache(model.config, x.shape[0], x.shape[1], kind, model.dtype)
    mode: AttentionMode = "cached" if cache is not None and through == "cache" else "prefill"
    rope = rope_tables(model.config, jnp.arange(x.shape[1])[None])
    starts = jnp.zeros(x.shape[0], jnp.int32)
    result: Any = block.apply({"params": layer}, x, rope, cache, starts, lengths, mode)
    return result[0]


@partial(jit_untuned, static_argnums=0)
def _score(
    model: Llama,
    ends: Mapping[str, Any],
    reference_ends: Mapping[str, Any] | None,
    x: jax.Array,
    reference_x: jax.Array | None,
    tokens: jax.Array,
    weights: jax.Array,
) -> jax.Array:
    """Sums over one window: negative log-likelihood of model and reference, KL, agreement, count.

    ``weights`` picks the targets; ``ends`` are the parameters outside the blocks.
    """

    def log_probabilities(ends: Mapping[str, Any], x: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": ends}, x, method="logits")
        return jax.nn.log_softmax(logits[0, :-1])

    log_p = log_probabilities(ends, x)
    targets = tokens[0, 1:, None]
    nll = -jnp.take_along_axis(log_p, targets, axis=-1)[:, 0]
    reference_nll = kl = agreement = jnp.zeros_like(nll)
    if reference_ends is not None and reference_x is not None:
        log_ref = log_probabilities(reference_ends, reference_x)
        reference_nll = -jnp.take_along_axis(log_ref, targets, axis=-1)[:, 0]
        kl = jnp.sum(jnp.exp(log_ref) * (log_ref - log_p), axis=-1)
        agreement = (jnp.argmax(log_ref, axis=-1) == jnp.argmax(log_p, axis=-1)).astype(jnp.float32)
    return jnp.stack([jnp.sum(weights * x) for x in (nll, reference_nll, kl, agreement, jnp.ones_like(nll))])

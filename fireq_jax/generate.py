"""Text generation: prefill and one ``while_loop`` in a single compiled program, or step by step for streaming."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fireq_jax.config import LlamaConfig
from fireq_jax.kv_cache import KVCache
from fireq_jax.llama import Llama
from fireq_jax.quantize import cache_kind
from fireq_jax.sampling import Sampling, sample

Prompts = Sequence[Sequence[int]] | Sequence[int] | np.ndarray | jax.Array
GREEDY = Sampling()


@partial(jax.tree_util.register_dataclass, data_fields=["tokens", "lengths"], meta_fields=[])
@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
      tokens: ``[batch, max_new_tokens]`` int32 without the prompts; behind a sequence's end it holds the id that
        ended it (0 if the model has none).
      lengths: ``[batch]`` int32, tokens generated per sequence, the ending one included.
    """

    tokens: jax.Array
    lengths: jax.Array

    def to_lists(self) -> list[list[int]]:
        """The generated tokens of each sequence, without what lies behind its end."""
        return [row[:n].tolist() for row, n in zip(np.asarray(self.tokens), np.asarray(self.lengths), strict=True)]


def padded_length(longest: int, limit: int) -> int:
    """Length to which prompts are padded: 64, 96, 128, 192, 256, 384 ..., so that few shapes are compiled."""
    size = 64
    while size < longest:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, limit)


def generate(
    model: Llama,
    params: Mapping[str, Any],
    prompts: Prompts,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    prompt_lengths: jax.Array | np.ndarray | None = None,
    eos_token_ids: Sequence[int] | None = None,
    cache_capacity: int | None = None,
) -> Generation:
    """Continues prompts.

    Prefill and loop are one jitted call; another prompt of the same padded length and batch size does not compile
    again. Works under an outer ``jax.jit`` as well, with an array of prompts; token ids and lengths are not known
    there and not checked.

    Args:
      model: the Llama.
      params: float or quantised parameters. Quantised ones bring the kind of cache with their recipe.
      prompts: one prompt or several of different lengths, as lists of token ids; or ``[batch, t]`` int, padded on
        the right, with ``prompt_lengths``.
      max_new_tokens: tokens to generate at most.
      sampling: greedy by default.
      key: PRNG key; required unless sampling is greedy.
      prompt_lengths: ``[batch]`` int, real tokens per row of an array of prompts; None if there is no padding.
      eos_token_ids: tokens that end a sequence; None takes the config's, ``()`` never stops.
      cache_capacity: cache slots per sequence; None takes what prompts and new tokens need.

    Returns:
      A :class:`Generation`.

    Raises:
      ValueError: a prompt is empty, a token id is not in the vocabulary, prompt and new tokens together exceed the
        model's positions or ``cache_capacity``, or sampling needs a key.
    """
    run = _prepare(model, params, prompts, max_new_tokens, sampling, key, prompt_lengths, eos_token_ids, cache_capacity)
    return compiled_generate(
        model, params, run.tokens, run.lengths, run.key, max_new_tokens, sampling, run.eos, run.capacity
    )


def generate_stream(
    model: Llama,
    params: Mapping[str, Any],
    prompts: Prompts,
    *,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    key: jax.Array | None = None,
    prompt_lengths: jax.Array | np.ndarray | None = None,
    eos_token_ids: Sequence[int] | None = None,
    cache_capacity: int | None = None,
) -> Iterator[np.ndarray]:
    """As :func:`generate`, but yields the tokens of each step as they come.

    Arguments and errors are those of :func:`generate`; the tokens are the same for the same key.

    Yields:
      ``[batch]`` int32 per step. A sequence that has ended repeats the token that ended it; the iterator stops when
      all have ended.
    """
    run = _prepare(model, params, prompts, max_new_tokens, sampling, key, prompt_lengths, eos_token_ids, cache_capacity)

    def steps() -> Iterator[np.ndarray]:
        state = _start(model, params, run.tokens, run.lengths, run.key, sampling, run.eos, run.capacity)
        for step in range(max_new_tokens):
            yield np.asarray(state.last)
            if step + 1 == max_new_tokens or bool(jnp.all(state.done)):
                return
            state = _step(model, params, state, sampling, run.eos)

    return steps()


@dataclass(frozen=True)
class _Run:
    tokens: jax.Array
    lengths: jax.Array
    key: jax.Array
    eos: tuple[int, ...]
    capacity: int


def _prepare(
    model: Llama,
    params: Mapping[str, Any],
    prompts: Prompts,
    max_new_tokens: int,
    sampling: Sampling,
    key: jax.Array | None,
    prompt_lengths: jax.Array | np.ndarray | None,
    eos_token_ids: Sequence[int] | None,
    cache_capacity: int | None,
) -> _Run:
    config = model.config
    if max_new_tokens < 1:
        raise ValueError(f"{max_new_tokens=} must be at least 1")
    if key is None:
        if sampling.temperature > 0:
            raise ValueError(f"sampling with temperature={sampling.temperature} needs key=jax.random.key(...)")
        key = jax.random.key(0)
    tokens, lengths, longest = _pad_prompts(prompts, prompt_lengths, config)
    needed = longest + max_new_tokens
    if needed > config.max_positions:
        raise ValueError(
            f"the longest prompt has {longest} tokens, {max_new_tokens=} more make {needed}: "
            f"beyond the model's {config.max_positions} positions"
        )
    if cache_capacity is None:
        cache_capacity = min(tokens.shape[1] + max_new_tokens, config.max_positions)
    elif needed > cache_capacity:
        raise ValueError(
            f"the longest prompt has {longest} tokens, {max_new_tokens=} more make {needed}: beyond {cache_capacity=}"
        )
    eos = tuple(config.eos_token_ids if eos_token_ids is None else eos_token_ids)
    return _Run(tokens, lengths, key, eos, cache_capacity)


def _pad_prompts(
    prompts: Prompts, prompt_lengths: jax.Array | np.ndarray | None, config: LlamaConfig
) -> tuple[jax.Array, jax.Array, int]:
    """Prompts as ``[batch, padded length]`` int32, their lengths, and the longest length."""
    if isinstance(prompts, jax.core.Tracer) or isinstance(prompt_lengths, jax.core.Tracer):
        tokens = jnp.atleast_2d(jnp.asarray(prompts, jnp.int32))
        full = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        lengths = full if prompt_lengths is None else jnp.asarray(prompt_lengths, jnp.int32)
        return tokens, lengths, tokens.shape[1]
    rows = _prompt_rows(prompts, prompt_lengths)
    for i, row in enumerate(rows):
        if row.size == 0:
            raise ValueError(f"prompt {i} is empty; a prompt needs at least one token, such as the model's bos token")
        outside = row[(row < 0) | (row >= config.vocab_size)]
        if outside.size:
            raise ValueError(
                f"prompt {i} holds token id {int(outside[0])}, outside the vocabulary of {config.vocab_size}"
            )
    longest = max(row.size for row in rows)
    padded = np.zeros((len(rows), max(padded_length(longest, config.max_positions), longest)), np.int32)
    for i, row in enumerate(rows):
        padded[i, : row.size] = row
    return jnp.asarray(padded), jnp.asarray([row.size for row in rows], jnp.int32), longest


def _prompt_rows(prompts: Prompts, prompt_lengths: jax.Array | np.ndarray | None) -> list[np.ndarray]:
    if isinstance(prompts, np.ndarray | jax.Array):
        array = np.atleast_2d(np.asarray(prompts))
        if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"an array of prompts must be [batch, t] integers, got {array.dtype} {array.shape}")
        lengths = [array.shape[1]] * len(array) if prompt_lengths is None else np.asarray(prompt_lengths).tolist()
        if len(lengths) != len(array) or any(not 0 <= n <= array.shape[1] for n in lengths):
            raise ValueError(f"prompt_lengths={lengths} does not describe prompts of shape {array.shape}")
        return [row[:n].astype(np.int64) for row, n in zip(array, lengths, strict=True)]
    if prompt_lengths is not None:
        raise ValueError("prompt_lengths goes with an array of prompts; lists have lengths of their own")
    if len(prompts) == 0:
        raise ValueError("there are no prompts")
    single = isinstance(prompts[0], int | np.integer)
    return [np.asarray(p, np.int64) for p in ([prompts] if single else prompts)]


@partial(jax.tree_util.register_dataclass, data_fields=["last", "done", "cache", "key", "step"], meta_fields=[])
@dataclass(frozen=True)
class _State:
    last: jax.Array  # [batch] the newest token of each sequence, not yet in the cache
    done: jax.Array  # [batch] whether that token ended it
    cache: KVCache
    key: jax.Array
    step: jax.Array  # tokens generated so far


def _is_end(tokens: jax.Array, eos: tuple[int, ...]) -> jax.Array:
    return jnp.isin(tokens, jnp.asarray(eos, jnp.int32)) if eos else jnp.zeros(tokens.shape, bool)


def _apply(model: Llama, params: Mapping[str, Any], *args: Any, method: str) -> tuple[jax.Array, KVCache]:
    """``model.apply`` with the type that prefill and decode return."""
    result: Any = model.apply({"params": params}, *args, method=method)
    return result


def _first_state(
    model: Llama,
    params: Mapping[str, Any],
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    eos: tuple[int, ...],
    capacity: int,
) -> _State:
    cache = KVCache.zeros(model.config, tokens.shape[0], capacity, cache_kind(params), model.dtype)
    logits, filled = _apply(model, params, tokens, lengths, cache, method="prefill")
    first = sample(logits, jax.random.fold_in(key, 0), sampling)
    return _State(first, _is_end(first, eos), filled, key, jnp.int32(1))


def _next_state(
    model: Llama, params: Mapping[str, Any], state: _State, sampling: Sampling, eos: tuple[int, ...]
) -> _State:
    logits, cache = _apply(model, params, state.last[:, None], state.cache, method="decode")
    drawn = sample(logits[:, -1], jax.random.fold_in(state.key, state.step), sampling)
    last = jnp.where(state.done, state.last, drawn)
    return _State(last, state.done | _is_end(last, eos), cache, state.key, state.step + 1)


_start = jax.jit(_first_state, static_argnums=(0, 5, 6, 7))
_step = jax.jit(_next_state, static_argnums=(0, 3, 4), donate_argnums=2)


@partial(jax.jit, static_argnums=(0, 5, 6, 7, 8))
def compiled_generate(
    model: Llama,
    params: Mapping[str, Any],
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    max_new_tokens: int,
    sampling: Sampling,
    eos: tuple[int, ...],
    capacity: int,
) -> Generation:
    """As :func:`generate`, of padded prompts ``[batch, t]`` int32 and checked settings."""
    batch = tokens.shape[0]
    first = _first_state(model, params, tokens, lengths, key, sampling, eos, capacity)
    out = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(first.last)

    def unfinished(carry: tuple[_State, jax.Array, jax.Array]) -> jax.Array:
        state, _, _ = carry
        return (state.step < max_new_tokens) & ~jnp.all(state.done)

    def body(carry: tuple[_State, jax.Array, jax.Array]) -> tuple[_State, jax.Array, jax.Array]:
        state, out, counts = carry
        counts = counts + ~state.done
        following = _next_state(model, params, state, sampling, eos)
        return following, out.at[:, state.step].set(following.last), counts

    last, out, counts = jax.lax.while_loop(unfinished, body, (first, out, jnp.ones(batch, jnp.int32)))
    # Columns that the loop did not reach take the token that ended the sequence, like those it did.
    reached = jnp.arange(max_new_tokens) < last.step
    return Generation(jnp.where(reached, out, last.last[:, None]), counts)

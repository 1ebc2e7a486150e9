"""What a float model's activations look like on a text: the statistics that calibrated quantisation reads."""

import json
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fireq_jax.compiling import jit_untuned
from fireq_jax.config import LlamaConfig
from fireq_jax.llama import Llama
from fireq_jax.quantize import layer_names, recipe_of
from fireq_jax.streams import block_inputs, observe_block

# Rotated keys kept per layer, spread over the whole text, for choosing the scales of the key cache.
KEY_SAMPLES = 2048
CALIBRATION_VERSION = 1
DEFAULT_WINDOW = 512
Statistics = dict[str, Any]


def calibrate(
    model: Llama,
    params: Mapping[str, Any],
    tokens: np.ndarray | list[int],
    *,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Runs a text through a float model, one layer at a time, and collects statistics of every linear input.

    Memory: on the device one layer's weights and statistics and one window; on the host the hidden states of the whole
    text (tokens · hidden · 4 bytes) and the result (per layer 3 · hidden² + intermediate² floats, if heads · head_dim =
    hidden).

    Args:
      model: the Llama.
      params: its float parameters.
      tokens: token ids; 8k are enough to halve the loss, more help a little. Those behind the last whole window are
        not used.
      window: tokens per sequence; None takes 512, or as many as the model and the text allow.
      progress: called with (layers done, layers in all).

    Returns:
      ``tokens``, ``[windows, window]`` int32, and ``config``, the model's (part of the structure, no array); and per
      layer name (``"layers_0"`` ...), as float32 numpy arrays:

      - ``attention_input``, ``attention_output``, ``mlp_input``, ``mlp_hidden``: second moments ``E[x xᵀ]``,
        ``[k, k]``, of the inputs of q/k/v, of o, of gate/up and of down.
      - ``keys``: rotated keys of about 2048 tokens or all, ``[samples, kv heads, head_dim]``.
      - ``key_absmax``: the largest magnitude of every rotated key channel over all tokens, ``[kv heads, head_dim]``.
      - ``key_pair_norm``: the largest norm of every rotated channel pair, ``[kv heads, head_dim / 2]``.
      - ``query_energy``: ``E[q²]`` of rotated queries, averaged over a kv head's query heads, ``[kv heads, head_dim]``.

    Raises:
      ValueError: the parameters are quantised, the text is shorter than a window or holds tokens outside the
        vocabulary, or the window exceeds the model's positions.
    """
    config = model.config
    if recipe_of(params) is not None:
        raise ValueError("calibration needs the float parameters, these are quantised")
    ids = cut_windows(config, tokens, window)
    names = layer_names(params)
    observer = Observer(config, params["embed"]["embedding"], ids)
    statistics: Statistics = {"tokens": ids, "config": config}
    for done, name in enumerate(names, 1):
        statistics[name] = observer.observe(params[name])
        if progress is not None:
            progress(done, len(names))
    return statistics


def cut_windows(config: LlamaConfig, tokens: np.ndarray | list[int], window: int | None) -> np.ndarray:
    """A calibration text as ``[windows, window]`` int32, without the tokens behind the last whole window.

    Raises:
      ValueError: the text is shorter than a window or holds tokens outside the vocabulary, or the window exceeds the
        model's positions.
    """
    ids = np.asarray(tokens)
    if window is None:
        window = min(DEFAULT_WINDOW, config.max_positions, max(ids.size, 1))
    if not 1 <= window <= config.max_positions:
        raise ValueError(f"{window=} must be between 1 and the model's {config.max_positions} positions")
    if ids.ndim != 1 or ids.size < window:
        raise ValueError(f"the text has {ids.size} tokens; calibration needs at least one window of {window}")
    config.check_tokens(ids)
    return ids[: ids.size - ids.size % window].reshape(-1, window).astype(np.int32)


class Observer:
    """A calibration text on its way through a float model, whose blocks are handed in one after another.

    Args:
      config: the model.
      embedding: ``[vocab, hidden]``.
      tokens: ``[windows, window]`` int32.
    """

    def __init__(self, config: LlamaConfig, embedding: jax.Array, tokens: np.ndarray) -> None:
        self._config = config
        self._tokens = tokens.size
        self._samples = min(-(-KEY_SAMPLES // len(tokens)), tokens.shape[1])
        self._hidden = [np.asarray(_embed(embedding, row)) for row in tokens]

    def observe(self, layer: Mapping[str, Any]) -> Statistics:
        """Takes the text through the next block; returns what :func:`calibrate` says of it."""
        sums: dict[str, jax.Array] = {}
        maxima: dict[str, jax.Array] = {}
        keys = []
        for i, x in enumerate(self._hidden):
            out, window_sums, window_maxima, sampled = _observe(
                self._config, dict(layer), jnp.asarray(x), self._samples
            )
            self._hidden[i] = np.asarray(out)
            sums = {key: sums.get(key, 0) + value for key, value in window_sums.items()}
            maxima = {key: jnp.maximum(maxima.get(key, 0), value) for key, value in window_maxima.items()}
            keys.append(np.asarray(sampled))
        statistics = {key: np.asarray(value) / self._tokens for key, value in sums.items()}
        statistics |= {key: np.asarray(value) for key, value in maxima.items()}
        return statistics | {"keys": np.concatenate(keys)}

    def state(self) -> dict[str, np.ndarray]:
        """The hidden states behind the blocks so far, ``[windows, window, hidden]``, for :meth:`restore`."""
        return {"observed": np.concatenate(self._hidden)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Goes on behind the blocks after which :meth:`state` was called."""
        self._hidden = [row[None] for row in np.asarray(state["observed"])]


@jax.jit
def _embed(embedding: jax.Array, row: jax.Array) -> jax.Array:
    return embedding[row].astype(jnp.float32)[None]


@partial(jit_untuned, static_argnums=(0, 3))
def _observe(
    config: LlamaConfig, layer: dict[str, Any], x: jax.Array, samples: int
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array], jax.Array]:
    """The block's output for one window, the window's sums and maxima, and a sample of its keys."""
    t = x.shape[1]
    out, seen = observe_block(config, layer, x)
    queries = seen["attention"]["queries"][0][0].reshape(t, config.num_kv_heads, -1, config.head_dim)
    sums = {
        place: jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)
        for place, rows in block_inputs(seen).items()
    }
    sums["query_energy"] = jnp.sum(jnp.mean(jnp.square(queries), axis=2), axis=0)
    keys = seen["attention"]["keys"][0][0]
    low, high = jnp.split(keys, 2, axis=-1)
    maxima = {
        "key_absmax": jnp.max(jnp.abs(keys), axis=0),
        "key_pair_norm": jnp.max(jnp.sqrt(low**2 + high**2), axis=0),
    }
    return out, sums, maxima, keys[jnp.linspace(0, t - 1, samples).astype(jnp.int32)]


def save_calibration(path: str | Path, calibration: Mapping[str, Any]) -> None:
    """Writes what :func:`calibrate` returned to one safetensors file, under a temporary name first.

    Args:
      path: the file; an existing one is replaced.
      calibration: statistics and tokens.
    """
    target = Path(path).expanduser().absolute()
    arrays = {
        f"{layer}/{name}": np.ascontiguousarray(value)
        for layer, statistics in calibration.items()
        if layer not in ("tokens", "config")
        for name, value in statistics.items()
    }
    metadata = {"fireq_calibration": str(CALIBRATION_VERSION), "config": json.dumps(calibration["config"].to_hf())}
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as staging:
        whole = Path(staging) / target.name
        save_file({**arrays, "tokens": np.ascontiguousarray(calibration["tokens"])}, whole, metadata)
        whole.rename(target)


def load_calibration(path: str | Path) -> Statistics:
    """Reads what :func:`save_calibration` wrote.

    Raises:
      ValueError: the file is no calibration, or one of another version.
      FileNotFoundError: there is no such file.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not a file")
    try:
        with safe_open(source, "numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{source} is not a safetensors file, or a damaged one: {error}") from error
    if (found := metadata.get("fireq_calibration")) != str(CALIBRATION_VERSION):
        raise ValueError(f"{source} holds calibration format {found}; this version reads {CALIBRATION_VERSION}")
    calibration: Statistics = {
        "tokens": arrays.pop("tokens"),
        "config": LlamaConfig.from_hf(json.loads(metadata["config"])),
    }
    for name, value in arrays.items():
        layer, statistic = name.split("/")
        calibration.setdefault(layer, {})[statistic] = value
    return calibration

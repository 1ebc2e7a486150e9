"""The Llama decoder."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from fireq_jax.config import LlamaConfig
from fireq_jax.kv_cache import KVCache
from fireq_jax.layers import AttentionMode, DecoderBlock, RMSNorm, apply_linears, rope_tables


class Llama(nn.Module):
    """A Llama-family causal language model; ``params`` may be float or quantised.

    Parameter tree (float shapes)::

        embed/embedding                      [vocab, hidden]
        layers_{i}/input_norm/scale          [hidden]
        layers_{i}/attention/{q,k,v}/kernel  [heads, head_dim, hidden]
        layers_{i}/attention/o/kernel        [hidden, heads, head_dim]
        layers_{i}/post_attention_norm/scale [hidden]
        layers_{i}/mlp/{gate,up}/kernel      [intermediate, hidden]
        layers_{i}/mlp/down/kernel           [hidden, intermediate]
        final_norm/scale                     [hidden]
        lm_head/kernel                       [vocab, hidden]; absent if tied to the embedding

    Attributes:
      config: sizes and settings.
      dtype: of activations and of the unquantised computation.
      implementation: of the kernels, see :mod:`pallas_kernels.dispatch`; None takes the best for the device.
    """

    config: LlamaConfig
    dtype: Any = jnp.bfloat16
    implementation: str | None = None

    def setup(self) -> None:
        """Declares the parts."""
        config = self.config
        self.embed = nn.Embed(config.vocab_size, config.hidden_size, dtype=self.dtype)
        self.layers = [DecoderBlock(config, self.dtype, self.implementation) for _ in range(config.num_layers)]
        self.final_norm = RMSNorm(config.rms_norm_eps, self.dtype)
        self.lm_head = OutputProjection(config, self.implementation)

    def __call__(
        self,
        tokens: jax.Array,
        lengths: jax.Array | None = None,
        cache: KVCache | None = None,
        through: Literal["cache", "prefill"] = "cache",
    ) -> jax.Array:
        """Logits of every position.

        Args:
          tokens: ``[batch, t]`` int, each row one sequence from its start.
          lengths: ``[batch]`` int32, real tokens per row; all if None. Logits behind them mean nothing.
          cache: an empty cache whose kind sets how keys and values are rounded; None for plain attention in the
            model's dtype.
          through: "cache" attends to what the cache stored, so that the logits are those a token-by-token decode
            would see; "prefill" attends as :meth:`prefill` does.

        Returns:
          ``[batch, t, vocab]`` float32.
        """
        if lengths is None:
            lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        cached = cache is not None and through == "cache"
        hidden, _ = self._hidden(tokens, lengths, cache, "cached" if cached else "prefill")
        return self.logits(hidden)

    def logits(self, x: jax.Array) -> jax.Array:
        """The model's end alone, for callers who walk through its blocks one at a time.

        Args:
          x: ``[batch, t, hidden]``, what the last block put out.

        Returns:
          ``[batch, t, vocab]`` float32.
        """
        return self.lm_head(self.final_norm(x), self.embed.embedding)

    def prefill(
        self, tokens: jax.Array, lengths: jax.Array, cache: KVCache, continued: bool = False
    ) -> tuple[jax.Array, KVCache]:
        """Reads prompts into the cache.

        Args:
          tokens: ``[batch, t]`` int, padded on the right with any valid token.
          lengths: ``[batch]`` int32, real tokens per row, at least 1.
          cache: where keys and values go.
          continued: the cache already holds earlier tokens of these sequences. When False it must be empty.

        Returns:
          ``[batch, vocab]`` float32 logits behind each row's last real token, and the filled cache.
        """
        hidden, filled = self._hidden(tokens, lengths, cache, "continue" if continued else "prefill")
        last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
        return self.logits(last)[:, 0], filled

    def decode(self, tokens: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Appends new tokens, attending through the cache.

        Args:
          tokens: ``[batch, t]`` int, usually t = 1.
          cache: holds everything before them.

        Returns:
          ``[batch, t, vocab]`` float32 logits and the grown cache.
        """
        lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
        hidden, grown = self._hidden(tokens, lengths, cache, "cached")
        return self.logits(hidden), grown

    def _hidden(
        self, tokens: jax.Array, lengths: jax.Array, cache: KVCache | None, mode: AttentionMode
    ) -> tuple[jax.Array, Any]:
        """What the last block puts out, and the filled cache."""
        starts = jnp.zeros_like(lengths) if cache is None else cache.lengths
        rope = rope_tables(self.config, starts[:, None] + jnp.arange(tokens.shape[1]))
        x = self.embed(tokens)
        updated: list[Any] = []
        for i, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[i]
            x, layer_cache = layer(x, rope, layer_cache, starts, lengths, mode)
            updated.append(layer_cache)
        return x, None if cache is None else cache.advanced(tuple(updated), lengths)


class OutputProjection(nn.Module):
    """Hidden states to logits, by a weight of its own or the embedding's."""

    config: LlamaConfig
    implementation: str | None = None

    @nn.compact
    def __call__(self, hidden: jax.Array, embedding: jax.Array) -> jax.Array:
        """``[..., hidden] -> [..., vocab]`` float32.

        Args:
          hidden: normalised hidden states.
          embedding: ``[vocab, hidden]``, used if the model is tied and the pytree has no separate weight. A tied
            model gets one when its output projection is quantised and its input side is not.
        """
        if self.has_variable("params", "kernel"):
            kernel: Any = self.get_variable("params", "kernel")
        elif self.config.tie_word_embeddings:
            kernel = embedding
        else:
            shape = (self.config.vocab_size, self.config.hidden_size)
            kernel = self.param("kernel", nn.initializers.normal(0.02), shape)
        [logits] = apply_linears(hidden, [kernel], [None], out_dtype=jnp.float32, implementation=self.implementation)
        return logits

"""The parts of a Llama in Flax Linen. Each takes float or INT4 weights, whichever the pytree holds."""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels
from fireq_jax.config import LlamaConfig
from fireq_jax.kv_cache import Int4LayerCache, LayerCache
from fireq_jax.qtensor import ByteWeight, Int4Weight, TiledInt4Weight, is_int4, takes_fp8

# How new tokens find keys and values:
#   "prefill"   they are the first of their sequences and attend to each other, to unquantised or e4m3 values
#   "continue"  as prefill, behind a prefix that the cache holds
#   "cached"    everything, their own keys and values included, is read back from the cache
AttentionMode = Literal["prefill", "continue", "cached"]


Weight = jax.Array | Int4Weight | TiledInt4Weight | ByteWeight
# What a linear layer takes: floats, or where all of its weights take e4m3 what these are made of.
Activations = jax.Array | pallas_kernels.Source


def apply_linears(
    x: Activations,
    weights: Sequence[Weight],
    biases: Sequence[jax.Array | None],
    residual: jax.Array | None = None,
    *,
    input_axes: int = 1,
    out_dtype: Any,
    implementation: str | None = None,
) -> list[jax.Array]:
    """``y = x · Wᵀ + bias`` over the last ``input_axes`` axes of x, for each weight, sums in float32.

    Args:
      x: ``[..., *in_shape]``.
      weights: ``[*out_shape, *in_shape]`` float, or int4 weights of those shapes.
      biases: ``out_shape`` or None, per weight.
      residual: ``[..., *out_shape]``, to which the one weight's result is added; or None.
      input_axes: number of axes in ``in_shape``.
      out_dtype: dtype of the results.
      implementation: of the int4 product, see :mod:`pallas_kernels.dispatch`.

    Returns:
      ``[..., *out_shape]`` per weight.
    """
    shape = x.shape if isinstance(x, jax.Array) else x.arrays()[0].shape
    batch_shape, in_shape = shape[:-input_axes], shape[-input_axes:]
    k = math.prod(in_shape)
    source: pallas_kernels.Source
    source = pallas_kernels.Unrounded(x.reshape(-1, k)) if isinstance(x, jax.Array) else x.as_matrix(k)
    rows = source.values if isinstance(source, pallas_kernels.Unrounded) else None
    out_shapes = [weight.shape[:-input_axes] for weight in weights]
    flat = [None if bias is None else bias.reshape(-1) for bias in biases]
    added = None if residual is None else residual.reshape(-1, math.prod(out_shapes[0]))
    tiled = [weight for weight in weights if isinstance(weight, TiledInt4Weight)]
    products: Sequence[jax.Array]
    if len(tiled) == len(weights) and len({(w.group_size, w.scale_dtype, w.numerics) for w in tiled}) == 1:
        products = _tiled_products(source, tiled, flat, added, out_dtype, implementation)
    else:
        if len(weights) > 1 and any(map(takes_fp8, weights)):  # once for all of them
            source = pallas_kernels.round_rows(source, implementation=implementation)
        products = [
            _product(rows, source, weight, bias, out_dtype, implementation)
            for weight, bias in zip(weights, flat, strict=True)
        ]
        if added is not None:
            [product] = products
            products = [added + product]
    return [y.reshape(*batch_shape, *out_shape) for y, out_shape in zip(products, out_shapes, strict=True)]


def _tiled_products(
    source: pallas_kernels.Source,
    weights: Sequence[TiledInt4Weight],
    biases: Sequence[jax.Array | None],
    residual: jax.Array | None,
    out_dtype: Any,
    implementation: str | None,
) -> Sequence[jax.Array]:
    """Of weights with tiles of one kind."""
    operands = [
        pallas_kernels.TiledWeight(weight.tiles, weight.tensor_scale, bias, math.prod(weight.out_shape))
        for weight, bias in zip(weights, biases, strict=True)
    ]
    first = weights[0]
    products: Sequence[jax.Array] = pallas_kernels.int4_matmuls_tiled(
        source, operands, residual,
        group_size=first.group_size, scale_dtype=first.scale_dtype, numerics=first.numerics, out_dtype=out_dtype,
        implementation=implementation,
    )  # fmt: skip
    return products


def _product(
    rows: jax.Array | None,
    source: pallas_kernels.Source,
    weight: Weight,
    bias: jax.Array | None,
    out_dtype: Any,
    implementation: str | None,
) -> jax.Array:
    """Of one weight of any kind; ``rows`` are the float inputs, if the source is no more than their rounding."""
    if isinstance(weight, TiledInt4Weight):
        return _tiled_products(source, [weight], [bias], None, out_dtype, implementation)[0]
    if takes_fp8(weight):
        int4 = cast(Int4Weight, weight)
        rounded = pallas_kernels.round_rows(source, implementation=implementation)
        product: jax.Array = pallas_kernels.int4_fp8_matmul(
            rounded.values, rounded.scale, int4.codes, int4.scales, int4.tensor_scale, bias,
            numerics=int4.numerics, out_dtype=out_dtype, implementation=implementation,
        )  # fmt: skip
        return product
    assert rows is not None  # who hands on a source asks takes_fp8 first
    return _float_product(rows, weight, bias, out_dtype)


def _float_product(x: jax.Array, weight: Weight, bias: jax.Array | None, out_dtype: Any) -> jax.Array:
    """``[m, k]`` times a weight in x's dtype."""
    if isinstance(weight, ByteWeight):
        return _byte_product(x, weight, bias, out_dtype)
    w = weight.astype(x.dtype) if isinstance(weight, jax.Array) else weight.dequantize(x.dtype)
    # Sums are float32 in any case, but a result in float32 is one more array to write, and a kernel to round it.
    result = out_dtype if bias is None and out_dtype == x.dtype else jnp.float32
    contract = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(x, w.reshape(-1, x.shape[1]), contract, preferred_element_type=result)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(out_dtype)


def _byte_product(x: jax.Array, weight: ByteWeight, bias: jax.Array | None, out_dtype: Any) -> jax.Array:
    """``[m, k]`` times codes of a byte, which XLA reads as they are and widens on the way into the product."""
    contract = (((1,), (1,)), ((), ()))
    y = jax.lax.dot_general(x, weight.codes.astype(x.dtype), contract, preferred_element_type=jnp.float32)
    y = y * weight.scales
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(out_dtype)


class Linear(nn.Module):
    """A linear layer between named groups of axes, ``[..., *in_shape] -> [..., *out_shape]``.

    Attributes:
      in_shape: trailing axes of the input.
      out_shape: trailing axes of the output.
      use_bias: whether there is a bias of shape ``out_shape``.
      dtype: of computation.
      implementation: of the int4 product, see :mod:`pallas_kernels.dispatch`.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    use_bias: bool = False
    dtype: Any = jnp.bfloat16
    implementation: str | None = None

    def setup(self) -> None:
        """Finds the weight.

        Raises:
          ValueError: the quantised weight in the pytree has other shapes than this layer.
        """
        self.kernel = self._kernel()
        self.bias = self.param("bias", nn.initializers.zeros, self.out_shape) if self.use_bias else None

    def __call__(self, x: Activations, residual: jax.Array | None = None) -> jax.Array:
        """Applies the layer, and adds the result to the residual, if there is one."""
        return project(x, [self], residual)[0]

    def observe(self, x: jax.Array) -> None:
        """Shows the input to a caller who collects statistics (calibration)."""
        self.sow("statistics", "input", x)

    def _kernel(self) -> Weight:
        # self.param compares shapes leaf by leaf, and the leaves of an int4 weight are not the float weight's.
        if self.has_variable("params", "kernel"):
            kernel: Any = self.get_variable("params", "kernel")
            if is_int4(kernel):
                if (kernel.out_shape, kernel.in_shape) != (self.out_shape, self.in_shape):
                    raise ValueError(
                        f"{self.name}: the weight maps {kernel.in_shape} to {kernel.out_shape}, "
                        f"the model needs {self.in_shape} to {self.out_shape}"
                    )
                return cast(Int4Weight | TiledInt4Weight, kernel)
        return self.param("kernel", nn.initializers.normal(0.02), (*self.out_shape, *self.in_shape))


def project(x: Activations, layers: Sequence[Linear], residual: jax.Array | None = None) -> list[jax.Array]:
    """Linear layers of the same input, whose int4 products may then be one; or a single one, added to a residual."""
    first = layers[0]
    if isinstance(x, jax.Array):
        for layer in layers:
            layer.observe(x)
        x = x.astype(first.dtype)
    return apply_linears(
        x,
        [layer.kernel for layer in layers],
        [layer.bias for layer in layers],
        residual,
        input_axes=len(first.in_shape),
        out_dtype=first.dtype,
        implementation=first.implementation,
    )


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) · scale`` over the last axis, computed in float32."""

    eps: float
    dtype: Any = jnp.bfloat16

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises ``[..., hidden]``; the result has ``dtype``."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


class NormToFp8(nn.Module):
    """:class:`RMSNorm` with the same leaf for INT4 products, which round it to e4m3 themselves."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> pallas_kernels.Unnormed:
        """Normalises ``[..., hidden]``."""
        return pallas_kernels.Unnormed(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


def rounds_input(module: nn.Module, *path: str) -> bool:
    """Whether the weight that a module holds under ``path`` takes e4m3, and nobody wants to see what it is given."""
    leaf: Any = module.variables.get("params", {})
    for name in (*path, "kernel"):
        leaf = leaf.get(name, {})
    return takes_fp8(leaf) and not module.is_mutable_collection("statistics")


def rope_tables(config: LlamaConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the rotation angles.

    Args:
      config: its head_dim and rope settings count.
      positions: ``[batch, t]`` int32.

    Returns:
      Two ``[batch, t, 1, head_dim / 2]`` float32 arrays.
    """
    frequencies = jnp.asarray(config.rope.inverse_frequencies(config.head_dim))
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


class Attention(nn.Module):
    """Causal grouped-query attention with a cache.

    With an INT4 cache queries are rounded to e4m3 per token and head. Fresh keys and values are rounded twice, each
    time from full precision: to e4m3 for the prompt's own attention, to int4 for the cache.
    """

    config: LlamaConfig
    dtype: Any = jnp.bfloat16
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Activations,
        rope: tuple[jax.Array, jax.Array],
        cache: LayerCache | None,
        starts: jax.Array,
        lengths: jax.Array,
        mode: AttentionMode,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attends t new tokens.

        Args:
          x: ``[batch, t, hidden]``, in e4m3 where q, k and v all take that.
          rope: tables for the new tokens' positions.
          cache: this layer's, or None for plain attention among the new tokens.
          starts: ``[batch]`` int32, tokens already in the cache.
          lengths: ``[batch]`` int32, how many of the t tokens are real.
          mode: where keys and values are read.
          residual: ``[batch, t, hidden]`` to which the result is added, or None.

        Returns:
          ``[batch, t, hidden]`` and the cache with the new tokens in it.
        """
        config = self.config

        def linear(name: str, in_shape: tuple[int, ...], out_shape: tuple[int, ...]) -> Linear:
            return Linear(in_shape, out_shape, config.attention_bias, self.dtype, self.implementation, name=name)

        query_shape = (config.num_heads, config.head_dim)
        kv_shape = (config.num_kv_heads, config.head_dim)
        scale, offset = self._per_channel("post_rope_scale"), self._per_channel("key_offset")
        shapes = {"q": query_shape, "k": kv_shape, "v": kv_shape}
        q, k, v = project(x, [linear(name, (config.hidden_size,), shape) for name, shape in shapes.items()])
        output = linear("o", query_shape, (config.hidden_size,))
        positions = starts[:, None] + jnp.arange(q.shape[1])
        if isinstance(cache, Int4LayerCache):
            fresh = (q, k, v, *rope, cache.arrays(), starts, lengths)
            tables: Any = {"scale": scale, "key_offset": offset, "implementation": self.implementation}
            if mode == "cached":
                q8, q_scale, arrays = pallas_kernels.rotate_and_append(*fresh, **tables)
                out = pallas_kernels.decode_attention(q8, q_scale, *arrays, positions, **self._settings())
            else:
                prompt, arrays = pallas_kernels.rotate_and_round(*fresh, **tables)
                # Slots before the new tokens are those of the prefix, written or not in this call.
                prefix: Any = (arrays, starts) if mode == "continue" else (None, None)
                out = pallas_kernels.prefill_attention(*prompt, lengths, *prefix, **self._settings())
            return output(out, residual), Int4LayerCache(*arrays)

        q, k = pallas_kernels.apply_ropes(q, k, *rope, scale, offset)
        self.sow("statistics", "queries", q)
        self.sow("statistics", "keys", k)
        updated = None
        if cache is not None:  # an empty one if this is a prompt
            updated = cache.filled(k, v) if mode == "prefill" else cache.append(k, v, starts, lengths)
        if updated is None or mode == "prefill":
            out = self._float_attention(q, k, v, None)
        else:
            out = self._float_attention(q, updated.k.swapaxes(1, 2), updated.v.swapaxes(1, 2), positions)
        return output(out, residual), updated

    def _settings(self) -> dict[str, Any]:
        """What attention of either kind is told beside its arrays."""
        return {
            "softmax_scale": self.config.head_dim**-0.5,
            "out_dtype": self.dtype,
            "implementation": self.implementation,
        }

    def _per_channel(self, name: str) -> jax.Array | None:
        """A leaf that belongs to the rotated keys' channels (:mod:`fireq_jax.scaling`), if the pytree has it.

        Raises:
          ValueError: the leaf is that of a model of another size.
        """
        if not self.has_variable("params", name):
            return None
        leaf: jax.Array = self.get_variable("params", name)
        needed = (self.config.num_kv_heads, self.config.head_dim)
        if leaf.shape != needed:
            raise ValueError(f"{self.name}: {name} is {leaf.shape}, the model needs {needed}")
        return leaf

    def _float_attention(self, q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array | None) -> jax.Array:
        """Attends to slots up to ``positions``, or among the new tokens if that is None."""
        mask = None
        if positions is not None:
            mask = (jnp.arange(k.shape[1]) <= positions[..., None])[:, None]
        q, k, v = (x.astype(self.dtype) for x in (q, k, v))
        # cuDNN's kernels take no float32, and with a mask they read one of the size of the scores.
        flash = mask is None and pallas_kernels.has_hopper_gpu() and q.dtype == jnp.bfloat16 and q.shape[3] in (64, 128)
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, scale=self.config.head_dim**-0.5, is_causal=positions is None,
            implementation="cudnn" if flash else None,
        )  # fmt: skip


class MLP(nn.Module):
    """``down(silu(gate(x)) · up(x))``."""

    config: LlamaConfig
    dtype: Any = jnp.bfloat16
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Activations, residual: jax.Array | None = None) -> jax.Array:
        """Applies the block to ``[..., hidden]``, in e4m3 where gate and up both take that; adds it to a residual."""

        def linear(name: str, in_size: int, out_size: int) -> Linear:
            bias = self.config.mlp_bias
            return Linear((in_size,), (out_size,), bias, self.dtype, self.implementation, name=name)

        hidden, wide = self.config.hidden_size, self.config.intermediate_size
        gate, up = project(x, [linear(name, hidden, wide) for name in ("gate", "up")])
        down = linear("down", wide, hidden)
        if rounds_input(self, "down"):
            return down(pallas_kernels.Ungated(gate, up), residual)
        return down(nn.silu(gate) * up, residual)


class DecoderBlock(nn.Module):
    """Attention and MLP, each behind an RMS norm and around a residual connection."""

    config: LlamaConfig
    dtype: Any = jnp.bfloat16
    implementation: str | None = None

    def setup(self) -> None:
        """Declares the parts."""
        shared = (self.config, self.dtype, self.implementation)
        self.attention, self.mlp = Attention(*shared), MLP(*shared)
        self.input_norm = self._norm("attention", "q", "k", "v")
        self.post_attention_norm = self._norm("mlp", "gate", "up")

    def _norm(self, half: str, *readers: str) -> "NormToFp8 | RMSNorm":
        """A norm whose result has the form that a half's first projections take."""
        eps = self.config.rms_norm_eps
        if all(rounds_input(self, half, reader) for reader in readers):
            return NormToFp8(eps)
        return RMSNorm(eps, self.dtype)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        cache: LayerCache | None,
        starts: jax.Array,
        lengths: jax.Array,
        mode: AttentionMode,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Applies the block to ``[batch, t, hidden]``; arguments as for :class:`Attention`."""
        x, cache = self.attention(self.input_norm(x), rope, cache, starts, lengths, mode, residual=x)
        return self.feed_forward(x), cache

    def feed_forward(self, x: jax.Array) -> jax.Array:
        """The second half of the block."""
        return self.mlp(self.post_attention_norm(x), residual=x)

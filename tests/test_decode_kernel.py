"""The decode attention kernel: refusals and lowering on the CPU, numbers on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_oracles import frobenius, on_hopper

import pallas_kernels as pk
from pallas_kernels import mosaic_decode
from pallas_kernels.decode_steps import DecodeShape
from pallas_kernels.tiling import DecodeCut


def inputs(batch, tokens, heads, kv_heads, head_dim, slots, seed=0):
    """Queries, a cache with outlier channels in its keys, and positions from the first slot to the last one."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(batch, tokens, heads, head_dim))
    k, v = (rng.normal(size=(batch, kv_heads, slots, head_dim)) for _ in range(2))
    k[..., 3] *= 8
    q8, q_scale = pk.quantize_fp8(jnp.asarray(q, jnp.float32))
    cache = [part for x in (k, v) for part in pk.quantize_kv(jnp.asarray(x, jnp.float32))]
    last = np.linspace(tokens - 1, slots - 1, batch).astype(np.int32)
    positions = jnp.asarray(last[:, None] - np.arange(tokens)[::-1], jnp.int32)
    return q8, q_scale, *cache, positions


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 4, 2, 96, 64), "head_dim=96 is not 64 or 128"),
        ((1, 5, 8, 2, 64, 64), "5 tokens of 4 heads are more than 16 rows"),
        ((1, 1, 4, 2, 64, 60), "60 slots are no multiple of 8"),
    ],
)
def test_named_kernel_is_refused_where_it_cannot_run(sizes, message):
    arguments = inputs(*sizes)
    with pytest.raises(NotImplementedError, match=message):
        pk.decode_attention(*arguments, softmax_scale=0.1, implementation="mosaic_gpu")
    assert pk.decode_attention(*arguments, softmax_scale=0.1).shape == arguments[0].shape
    if not pk.has_hopper_gpu():
        with pytest.raises(NotImplementedError, match="no Hopper GPU"):
            pk.decode_attention(*inputs(1, 1, 4, 2, 64, 64), softmax_scale=0.1, implementation="mosaic_gpu")


SIZES = [
    (1, 1, 32, 8, 128, 4096),
    (16, 1, 32, 8, 128, 1024),
    (3, 1, 9, 3, 64, 520),
    (2, 4, 32, 8, 128, 2048),
    (64, 1, 28, 4, 128, 136),
    (1, 1, 32, 32, 128, 16384),
    (5, 1, 8, 8, 64, 8),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_lowers_for_cuda_without_a_gpu(sizes):
    batch, tokens, heads, kv, d, slots = sizes
    shape = jax.ShapeDtypeStruct
    codes, scales = shape((batch, kv, slots, d // 2), jnp.uint8), shape((batch, kv, slots), jnp.bfloat16)
    arguments = (
        shape((batch, tokens, heads, d), jnp.float8_e4m3fn), shape((batch, tokens, heads), jnp.float32),
        codes, scales, codes, scales, shape((batch, tokens), jnp.int32),
    )  # fmt: skip
    kernel = functools.partial(mosaic_decode.decode_attention, softmax_scale=d**-0.5)
    assert "mosaic_gpu" in jax.jit(kernel).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("resident", [3, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_multiprocessor_holds_as_many_blocks_as_a_cut_says(head_dim, resident):
    words = DecodeShape(64, 1, 32, 8, head_dim, 4096, DecodeCut(1, resident=resident)).shared_words
    its_own = 2 * 4 * 4 * 8  # barriers of two tiles of each warp
    each = 4 * words + its_own + 1024  # which the system keeps of every block
    assert resident * each <= 228 * 1024 < (resident + 1) * each


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    "cut",
    [
        None,
        DecodeCut(1, 8),
        DecodeCut(5),
        DecodeCut(3, 8, 3),
        DecodeCut(8, 8, clustered=True),
        DecodeCut(3, clustered=True),
        DecodeCut(2, resident=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernel_against_the_reference(sizes, cut):
    arguments, scale = inputs(*sizes), sizes[4] ** -0.5
    kernel = jax.jit(
        functools.partial(mosaic_decode.decode_attention, softmax_scale=scale, out_dtype=jnp.float32, cut=cut)
    )
    results = [kernel(*arguments) for _ in range(10)]
    expected = pk.decode_attention(*arguments, softmax_scale=scale, out_dtype=jnp.float32, implementation="reference")
    # exp(score - max) · v_scale is rounded to bf16 by both, with another maximum in the kernel.
    assert frobenius(results[0], np.asarray(expected, np.float64)) < 3e-3
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])

"""The kernel between the projections and decode attention: emulated, lowered, and on a Hopper GPU."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from emulated_gpu import emulated
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracles import BF16, on_hopper

import pallas_kernels as pk
from pallas_kernels import (
    append_block_steps,
    append_lanes,
    append_steps,
    append_values,
    mosaic_append,
    reference_rotation,
    row_steps,
)

MODULES = (mosaic_append, append_steps, append_block_steps, append_values, append_lanes, row_steps)


def rotate_and_append(*arrays, **options):
    (q8, q_scale), cache = mosaic_append.rotate(*arrays, prompt=False, **options)
    return q8, q_scale, cache


rotate_and_round = functools.partial(mosaic_append.rotate, prompt=True)


def inputs(batch, tokens, heads, kv_heads, head_dim, slots, starts, lengths, mixed, scaled=True):
    rng = np.random.default_rng(batch + slots)

    def normal(*shape, dtype=BF16):
        return jnp.asarray(rng.normal(size=shape) * np.exp(rng.normal(size=(*shape[:-1], 1))), dtype)

    def rows():
        return normal(batch, tokens, kv_heads, head_dim)

    angles = rng.uniform(0, 100, size=(batch, tokens, 1, head_dim // 2))
    rotation = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    cache = []
    for seed in range(2):
        codes = jnp.asarray(rng.integers(0, 256, size=(batch, kv_heads, slots, head_dim // 2)), jnp.uint8)
        cache += [codes, jnp.full((batch, kv_heads, slots), seed + 2, BF16)]
    v = rows().at[0, 0, 0].set(0)  # a row of zeros has a scale, too
    arrays = (
        normal(batch, tokens, heads, head_dim), rows(), v, *rotation, tuple(cache), jnp.asarray(starts, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
    )  # fmt: skip
    float32 = functools.partial(normal, dtype=jnp.float32)
    options = {
        "scale": jnp.exp(float32(kv_heads, head_dim) / 4) if scaled else None,
        "key_offset": float32(kv_heads, head_dim) if mixed else None,
    }
    return arrays, options


def check(arrays, options, kernel):
    before = arrays[5]
    q8, q_scale, cache = kernel(*arrays, **options)
    expected8, expected_scale, expected_cache = reference_rotation.rotate_and_append(*arrays, **options)
    np.testing.assert_allclose(q_scale, expected_scale, rtol=1e-5)

    def same(actual, expected, step):
        """Equal but where float32 sums in another order fall on the other side of a rounding.

        One in a thousand bf16 values, over a scale in bf16, lies in the middle between two codes, where a product with
        the scale's reciprocal goes either way: of few codes five may.
        """
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        assert np.sum(actual != expected) < 2e-3 * actual.size + 5
        assert np.all(np.abs(actual - expected) <= step(expected))

    same(q8.astype(jnp.float32), expected8.astype(jnp.float32), lambda x: np.maximum(np.abs(x) / 8, 2**-9))
    for i in (0, 2):
        same(pk.unpack_int4(cache[i]), pk.unpack_int4(expected_cache[i]), lambda x: np.ones_like(x))
    for i in (1, 3):
        same(cache[i], expected_cache[i], lambda x: np.abs(x) / 128)
    # What is not a new token's stays, bit for bit.
    starts, lengths = (np.asarray(x)[:, None] for x in arrays[6:8])
    slots = np.arange(before[1].shape[2])
    old = (slots < starts) | (slots >= starts + lengths)
    for actual, array in zip(cache, before, strict=True):
        np.testing.assert_array_equal(
            np.asarray(actual).swapaxes(1, 2)[old].view(np.uint8), np.asarray(array).swapaxes(1, 2)[old].view(np.uint8)
        )


CASES = [
    (1, 1, 2, 2, 64, 6, [0], [1], False, False),
    (3, 1, 9, 3, 64, 8, [7, 0, 8], [1, 1, 1], True, True),  # the third sequence's cache is full
    (2, 3, 4, 1, 128, 10, [2, 5], [3, 1], True, True),
    (1, 2, 8, 8, 128, 4, [1], [2], False, True),
]


PROMPTS = [
    (1, 1, 2, 2, 64, 6, [0], [1], False, False),
    (2, 150, 3, 1, 64, 200, [40, 0], [150, 130], True, True),
    (1, 200, 4, 2, 128, 200, [0], [200], False, True),
    (2, 70, 2, 1, 128, 90, [5, 20], [70, 3], True, True),
]


def check_prompt(arrays, options, kernel):
    prompt, cache = kernel(*arrays, **options)
    check(arrays, options, lambda *_, **__: (*prompt[:2], cache))
    expected, _ = reference_rotation.rotate_and_round(*arrays, **options)
    for i in (3, 5):
        np.testing.assert_allclose(prompt[i], expected[i], rtol=1e-5)
    for i in (2, 4):
        actual, wanted = (np.asarray(x[i], np.float64) for x in (prompt, expected))
        # As above.
        assert np.sum(actual != wanted) < 2e-3 * actual.size + 5
        assert np.all(np.abs(actual - wanted) <= np.maximum(np.abs(wanted) / 8, 2**-9))


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_on_the_emulated_multiprocessor(case, monkeypatch):
    monkeypatch.setattr(mosaic_append, "STREAMING_MULTIPROCESSORS", 4)  # several queries per warp
    arrays, options = inputs(*case)
    with emulated(*MODULES):
        prompt, cache = rotate_and_round(*arrays, **options)
    check_prompt(arrays, options, lambda *_, **__: (prompt, cache))


@pytest.mark.parametrize("case", CASES)
def test_on_the_emulated_multiprocessor(case):
    arrays, options = inputs(*case)
    with emulated(*MODULES):
        q8, q_scale, cache = rotate_and_append(*arrays, **options)
    check(arrays, options, lambda *_, **__: (q8, q_scale, cache))


@st.composite
def any_rotation(draw, most_tokens):
    """What :func:`inputs` takes: any sizes, lengths and places in the cache, some of which are full."""
    batch, tokens, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, most_tokens)), draw(st.integers(1, 3))
    slots = draw(st.integers(1, tokens + 40))
    starts, lengths = [], []
    for _ in range(batch):
        lengths.append(draw(st.integers(1, tokens)))
        starts.append(draw(st.integers(0, slots)))
    heads, head_dim = kv_heads * draw(st.integers(1, 4)), draw(st.sampled_from([64, 128]))
    return batch, tokens, heads, kv_heads, head_dim, slots, starts, lengths, draw(st.booleans()), draw(st.booleans())


@given(any_rotation(4))
@settings(max_examples=8)
def test_any_shape_on_the_emulated_multiprocessor(case):
    arrays, options = inputs(*case)
    with emulated(*MODULES):
        q8, q_scale, cache = rotate_and_append(*arrays, **options)
    check(arrays, options, lambda *_, **__: (q8, q_scale, cache))


@given(any_rotation(140), st.integers(1, 6))
@settings(max_examples=5)
def test_prompts_of_any_shape_on_the_emulated_multiprocessor(case, multiprocessors):
    arrays, options = inputs(*case)
    with (
        mock.patch.object(mosaic_append, "STREAMING_MULTIPROCESSORS", multiprocessors),
        emulated(*MODULES),
    ):
        prompt, cache = rotate_and_round(*arrays, **options)
    check_prompt(arrays, options, lambda *_, **__: (prompt, cache))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "multiprocessors"),
    [
        (40, 8, 128, 1),  # the same lanes take eight heads, of several kv heads
        (28, 4, 64, 1),  # all seven of one
        (11, 1, 64, 1),  # six, then five
        (20, 4, 128, 400),  # one, as all blocks run at once
    ],
)
def test_heads_of_the_same_lanes_on_the_emulated_multiprocessor(
    heads, kv_heads, head_dim, multiprocessors, monkeypatch
):  # fmt: skip
    monkeypatch.setattr(mosaic_append, "STREAMING_MULTIPROCESSORS", multiprocessors)
    arrays, options = inputs(2, 11, heads, kv_heads, head_dim, 40, [3, 30], [11, 4], True)
    with emulated(*MODULES):
        prompt, cache = rotate_and_round(*arrays, **options)
    check_prompt(arrays, options, lambda *_, **__: (prompt, cache))


@pytest.mark.parametrize(
    ("operation", "case"),
    [
        *((rotate_and_append, case) for case in CASES),
        *((rotate_and_round, case) for case in PROMPTS),
    ],
)
def test_lowers_for_cuda_in_place(operation, case):
    arrays, options = inputs(*case)
    kernel = functools.partial(operation, **options)
    text = jax.jit(kernel, donate_argnums=5).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    [call] = [line for line in text.splitlines() if "@mosaic_gpu" in line]
    assert call.count("output_operand_alias") >= 4


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("case", [*CASES, (16, 1, 32, 8, 128, 1024, range(16), [1] * 16, True, True)])
def test_on_a_gpu(case):
    check(*inputs(*case), rotate_and_append)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    "case",
    [
        *PROMPTS,
        (3, 1000, 32, 8, 128, 1024, [0, 10, 0], [1000, 777, 1], True, True),
        (3, 1000, 32, 8, 128, 1024, [0, 10, 0], [1000, 777, 1], False, True),
        (2, 513, 9, 3, 64, 600, [0, 1], [513, 512], False, True),
    ],
)
def test_prompts_on_a_gpu(case):
    check_prompt(*inputs(*case), rotate_and_round)


def test_one_table_of_angles_serves_all_sequences():
    arrays, options = inputs(2, 3, 4, 2, 64, 8, [0, 4], [3, 2], True)
    one = [x[:1] for x in arrays[3:5]]
    each = [jnp.broadcast_to(x, (2, *x.shape[1:])) for x in one]
    actual, expected = (pk.rotate_and_append(*arrays[:3], *tables, *arrays[5:], **options) for tables in (one, each))
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (2, lambda v: v[:, :1], r"v must have shape \(2, 3, 2, 64\)"),
        (3, lambda cos: cos[..., :8], "cos must have shape"),
        (6, lambda starts: starts[:1], r"starts must have shape \(2,\)"),
    ],
)
def test_refuses_what_does_not_belong_together(at, change, message):
    arrays, options = inputs(2, 3, 4, 2, 64, 8, [0, 4], [3, 2], True)
    arrays = (*arrays[:at], change(arrays[at]), *arrays[at + 1 :])
    with pytest.raises(ValueError, match=message):
        pk.rotate_and_append(*arrays, **options)

"""pallas_kernels.reference against plain numpy in float64, fed the same quantised inputs."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import pallas_kernels as pk
from pallas_kernels import reference_attention, reference_rotation

# Float32 sums of at most a few thousand terms, against float64.
FLOAT32 = 1e-5
# One rounding to bf16 (8 significant bits), relative to the value.
BF16 = 2.0**-8


def relative_error(actual, expected):
    return np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected)


@settings(max_examples=25)  # every new shape compiles
@given(hnp.arrays(np.int8, hnp.array_shapes(max_dims=3).map(lambda s: (*s, 6)), elements=st.integers(-8, 7)))
def test_packing_round_trip(codes):
    packed = pk.pack_int4(jnp.asarray(codes))
    assert packed.dtype == jnp.uint8
    assert packed.shape == (*codes.shape[:-1], 3)
    np.testing.assert_array_equal(pk.unpack_int4(packed), codes)


def test_packing_is_xlas_own_order():
    codes = jnp.arange(-8, 8, dtype=jnp.int8).reshape(2, 8)
    as_int4 = jax.lax.bitcast_convert_type(pk.pack_int4(codes), jnp.int4).reshape(2, 8)
    np.testing.assert_array_equal(as_int4.astype(jnp.int8), codes)


def test_packing_refuses_odd_sizes():
    with pytest.raises(ValueError, match="must be even"):
        pk.pack_int4(jnp.zeros((2, 3), jnp.int8))


@settings(max_examples=25)  # every new shape compiles
@given(hnp.arrays(np.float32, (64,), elements=st.floats(-1e4, 1e4, width=32)))
def test_e4m3_rounding_is_the_nearest_value_and_saturates(x):
    expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(np.asarray(pk.round_to_e4m3(jnp.asarray(x))).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("axis", [-1, (1, 3)])
def test_fp8_quantisation(axis):
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    x[0, :, 0] = 0  # whole slices of zeros along both kinds of axis
    x8, scale = pk.quantize_fp8(jnp.asarray(x), axis)
    expected = np.abs(x).max(axis) / np.float32(448)
    # XLA multiplies by 1/448 where numpy divides: one unit in the last place
    np.testing.assert_allclose(scale, np.where(expected == 0, 1, expected), rtol=2.0**-22)
    restored = np.asarray(x8, np.float32) * np.expand_dims(np.asarray(scale), axis)
    # e4m3 has 4 significant bits; its smallest step is 2^-9, times the scale of a value as large as 448
    np.testing.assert_allclose(restored, x, rtol=2.0**-4, atol=2.0**-10 * float(np.max(scale)))


@pytest.mark.parametrize("tiny", [1e-42, 1e-38, 1e-36])
def test_fp8_quantisation_of_numbers_too_small_to_scale(tiny):
    x8, scale = pk.quantize_fp8(jnp.full((1, 4), tiny, jnp.float32))
    assert np.isfinite(np.asarray(x8, np.float32)).all()
    assert np.isfinite(scale).all()
    assert (np.asarray(scale) > 0).all()


def random_weight(rng, n, k, group, scale_dtype):
    codes = rng.integers(-8, 8, (n, k)).astype(np.int8)
    scales = rng.uniform(0.01, 2, (n, k // group)).astype(scale_dtype)
    return codes, scales


@pytest.mark.parametrize("numerics", ["exact", "folded"])
@pytest.mark.parametrize("scale_dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("m", "n", "k", "group"), [(1, 8, 128, 128), (5, 96, 576, 64), (70, 33, 160, 32)])
def test_matmul(m, n, k, group, scale_dtype, numerics):
    rng = np.random.default_rng(m)
    codes, scales = random_weight(rng, n, k, group, scale_dtype)
    x8 = rng.normal(size=(m, k)).astype(ml_dtypes.float8_e4m3fn)
    x_scale = rng.uniform(0.1, 3, m).astype(np.float32)
    bias = rng.normal(size=n).astype(np.float32)
    tensor_scale = np.float32(0.25)
    w = codes.astype(np.float64) * scales.astype(np.float64).repeat(group, 1)
    if numerics == "folded":
        w = w.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = x8.astype(np.float64) @ (w * tensor_scale).T * x_scale[:, None] + bias
    args = [jnp.asarray(a) for a in (x8, x_scale)]
    weight = [pk.pack_int4(jnp.asarray(codes)), jnp.asarray(scales), jnp.asarray(tensor_scale)]
    for out_dtype, tolerance in ((jnp.float32, FLOAT32), (jnp.bfloat16, BF16)):
        y = pk.int4_fp8_matmul(*args, *weight, jnp.asarray(bias), numerics=numerics, out_dtype=out_dtype)
        assert y.dtype == out_dtype
        assert relative_error(y, expected) < tolerance


def test_kv_quantisation_is_within_half_a_step():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 64)).astype(np.float32)
    x[0, 0, 0] = 0
    codes, scale = pk.quantize_kv(jnp.asarray(x))
    assert scale.dtype == jnp.bfloat16
    assert codes.shape == (2, 3, 4, 32)
    step = np.asarray(scale, np.float32)[..., None]
    extreme = np.where(x.max(-1) > -x.min(-1), x.max(-1), x.min(-1))
    np.testing.assert_allclose(step[..., 0], np.where(extreme == 0, 1, -extreme / 8), rtol=BF16)
    values = np.asarray(pk.unpack_int4(codes), np.float32)
    assert (
        np.take_along_axis(values, np.abs(x).argmax(-1)[..., None], -1)[..., 0] == np.where(extreme == 0, 0, -8)
    ).all()
    # half a step inside the grid, from -8 to 7 steps; beyond 7 the distance to it, at most one step and what the
    # rounding of the scale to bf16 takes off at the other end
    inside = x / step <= 7
    error = np.abs(values * step - x) / np.abs(step)
    assert (error[inside] <= 0.5 + 8 * BF16).all()
    assert (error[~inside] <= 1 + 8 * BF16).all()


def test_rows_are_written_behind_what_is_there_and_nowhere_else():
    rng = np.random.default_rng(0)
    cache = rng.integers(0, 255, (3, 2, 8, 4)).astype(np.uint8)
    rows = rng.integers(0, 255, (3, 5, 2, 4)).astype(np.uint8)
    starts, lengths = np.array([0, 3, 6], np.int32), np.array([5, 2, 5], np.int32)
    expected = cache.copy()
    for b in range(3):
        for j in range(lengths[b]):
            if starts[b] + j < 8:  # the third sequence runs out of slots
                expected[b, :, starts[b] + j] = rows[b, j]
    written = pk.write_rows(jnp.asarray(cache), jnp.asarray(rows), jnp.asarray(starts), jnp.asarray(lengths))
    np.testing.assert_array_equal(written, expected)


def attention_oracle(q, k, v, visible, softmax_scale):
    """Float64 attention, one query at a time: q [t, h, d], k and v [s, kv, d], visible [t, s]."""
    t, h, d = q.shape
    out = np.zeros((t, h, d))
    group = h // k.shape[1]
    for i in range(t):
        for head in range(h):
            keys, values = k[visible[i], head // group], v[visible[i], head // group]
            scores = keys @ q[i, head] * softmax_scale
            weights = np.exp(scores - scores.max())
            out[i, head] = weights @ values / weights.sum()
    return out


def fp8(rng, shape, axis):
    x8, scale = pk.quantize_fp8(jnp.asarray(rng.normal(size=shape), jnp.float32), axis)
    return x8, scale, np.asarray(x8, np.float64) * np.expand_dims(np.asarray(scale, np.float64), axis)


def int4_cache(rng, b, kv, s, d):
    codes = rng.integers(-8, 8, (b, kv, s, d)).astype(np.int8)
    # both signs: a scale may be negative
    scales = (rng.uniform(0.05, 0.3, (b, kv, s)) * rng.choice([-1, 1], (b, kv, s))).astype(ml_dtypes.bfloat16)
    values = codes.astype(np.float64) * scales.astype(np.float64)[..., None]
    return pk.pack_int4(jnp.asarray(codes)), jnp.asarray(scales), values.transpose(0, 2, 1, 3)


def in_blocks(values, largest=pk.KEY_MAX):
    """e4m3 keys or values with a scale per 128 tokens, and what they stand for."""
    x8, scale = pk.quantize_blocks(jnp.asarray(values, jnp.float32), largest)
    scales = np.asarray(scale, np.float64).repeat(128, 2)[:, :, : values.shape[1]].swapaxes(1, 2)
    return x8, scale, np.asarray(x8, np.float64) * scales[..., None]


@pytest.mark.parametrize("largest", [pk.KEY_MAX, pk.E4M3_MAX])
def test_blocks_of_tokens_have_scales_of_their_own(largest):
    values = np.random.default_rng(0).normal(size=(2, 300, 3, 16))
    values[:, 128:256] *= 1000
    values[1, 256:, 2] = 0
    x8, scale, back = in_blocks(values, largest)
    assert (x8.shape, scale.shape) == ((2, 300, 3, 16), (2, 3, 3))
    absmax = np.stack([np.abs(values[:, i : i + 128]).max((1, 3)) for i in (0, 128, 256)], 2)
    np.testing.assert_array_equal(
        scale, np.where(absmax > 0, 2.0 ** np.ceil(np.log2(np.maximum(absmax, 1e-30) / largest)), 1)
    )
    # Half a unit of e4m3's four bits, or of its smallest subnormal.
    steps = np.asarray(scale).repeat(128, 2)[:, :, :300].swapaxes(1, 2)[..., None]
    assert np.all(np.abs(back - values) <= np.maximum(np.abs(values) / 16, 2**-10 * steps) * (1 + 1e-6))


def test_transposed_values_lie_as_documented_and_come_back():
    v8, _ = pk.quantize_fp8(jnp.asarray(np.random.default_rng(0).normal(size=(2, 150, 3, 16))))
    transposed = np.asarray(pk.transpose_values(v8), np.float32)
    assert transposed.shape == (2, 3, 16, 256)
    for token in (0, 1, 2, 7, 8, 13, 127, 128, 149):
        h, i, e = token % 16 // 8, token % 8 // 2, token % 2
        place = token // 16 * 16 + 4 * i + 2 * h + e
        np.testing.assert_array_equal(transposed[..., place], np.asarray(v8[:, token], np.float32))
    np.testing.assert_array_equal(reference_rotation.restore_values(pk.transpose_values(v8), 150), v8)
    assert np.sum(transposed != 0) == np.sum(np.asarray(v8, np.float32) != 0)


def test_rounded_prompts_are_the_parts_they_are_made_of():
    """Keys and values of unreal tokens are zeros, and scales do not see them; the cache is that of decoding."""
    rng = np.random.default_rng(0)
    b, t, h, kv, d = 2, 140, 4, 2, 16
    q, k, v = (jnp.asarray(rng.normal(size=(b, t, n, d)), jnp.bfloat16) for n in (h, kv, kv))
    lengths = np.array([140, 130], np.int32)
    k = k.at[1, 130:].set(1e4)
    angles = rng.uniform(0, 9, (b, t, 1, d // 2))
    tables = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    cache = (jnp.zeros((b, kv, 160, d // 2), jnp.uint8), jnp.zeros((b, kv, 160), jnp.bfloat16)) * 2
    scale = jnp.asarray(rng.uniform(0.5, 2, (kv, d)), jnp.float32)
    arrays = (q, k, v, *tables, cache, jnp.array([0, 3], jnp.int32), jnp.asarray(lengths))
    (q8, q_scale, k8, k_scale, v8, v_scale), filled = pk.rotate_and_round(*arrays, scale=scale)
    expected8, expected_scale, expected_cache = pk.rotate_and_append(*arrays, scale=scale)
    for actual, expected in zip((q8, q_scale, *filled), (expected8, expected_scale, *expected_cache), strict=True):
        np.testing.assert_array_equal(actual, expected)
    _, rotated = pk.apply_ropes(q, k, *tables, scale)
    for i in range(b):
        keys = rotated, k8, k_scale, pk.KEY_MAX
        for fresh, x8, found, largest in (keys, (v, reference_rotation.restore_values(v8, t), v_scale, pk.E4M3_MAX)):
            kept = np.asarray(fresh, np.float32)[i : i + 1, : lengths[i]]
            _, expected, back = in_blocks(kept, largest)
            np.testing.assert_allclose(found[i], expected[0], rtol=FLOAT32)
            scales = np.asarray(found[i], np.float64).repeat(128, 1)[:, :t].T[..., None]
            actual = np.asarray(x8[i], np.float64) * scales
            np.testing.assert_allclose(actual[: lengths[i]], back[0], rtol=FLOAT32)
            assert not actual[lengths[i] :].any()


def test_small_channels_beside_large_ones_keep_their_precision():
    """Models have channels of keys that are hundreds of times larger than others, and many small ones count."""
    rng = np.random.default_rng(0)
    b, t, h, kv, d = 1, 130, 4, 2, 64
    q, k = (jnp.asarray(np.exp(rng.normal(size=(b, t, n, d)) * 0.5), jnp.bfloat16).at[..., 5].set(200) for n in (h, kv))
    straight = jnp.ones((b, t, 1, d // 2)), jnp.zeros((b, t, 1, d // 2))
    cache = (jnp.zeros((b, kv, 160, d // 2), jnp.uint8), jnp.zeros((b, kv, 160), jnp.bfloat16)) * 2
    (q8, q_scale, k8, k_scale, *_), _ = pk.rotate_and_round(
        q, k, k, *straight, cache, jnp.zeros(b, jnp.int32), jnp.full(b, t, jnp.int32)
    )
    scales = np.asarray(k_scale).repeat(128, 2)[:, :, :t].swapaxes(1, 2)
    for exact, rounded, scale in ((q, q8, np.asarray(q_scale)), (k, k8, scales)):
        back = np.asarray(rounded, np.float64) * scale[..., None]
        exact = np.asarray(exact, np.float64)
        # Half a unit of e4m3's four bits; rounding is independent, so that the mean is smaller.
        assert np.mean(np.abs(back - exact) / exact) < 2.0**-5


# e4m3(256 p) has a relative error of at most 2^-4 per weight, independent over the keys; measured 0.01 to 0.02.
PREFILL = 0.03


@pytest.mark.parametrize("prefix_slots", [0, 9])
@pytest.mark.parametrize(("h", "kv", "d", "t"), [(4, 4, 16, 13), (6, 2, 32, 150), (7, 1, 64, 13)])
def test_prefill_attention(h, kv, d, t, prefix_slots):
    rng = np.random.default_rng(h)
    b, scale = 3, d**-0.5
    q8, q_scale, q = fp8(rng, (b, t, h, d), -1)
    k8, k_scale, k = in_blocks(rng.normal(size=(b, t, kv, d)))
    v8, v_scale, v = in_blocks(rng.normal(size=(b, t, kv, d)))
    v8 = pk.transpose_values(v8)
    lengths = np.array([t, 1, 6], np.int32)
    prefix, prefix_lengths = None, np.zeros(b, np.int32)
    if prefix_slots:
        k_codes, k_scales, k_old = int4_cache(rng, b, kv, prefix_slots, d)
        v_codes, v_scales, v_old = int4_cache(rng, b, kv, prefix_slots, d)
        prefix, prefix_lengths = (k_codes, k_scales, v_codes, v_scales), np.array([9, 0, 4], np.int32)
        k, v = np.concatenate([k_old, k], 1), np.concatenate([v_old, v], 1)
    out = pk.prefill_attention(
        q8, q_scale, k8, k_scale, v8, v_scale, jnp.asarray(lengths), prefix,
        None if prefix is None else jnp.asarray(prefix_lengths), softmax_scale=scale, out_dtype=jnp.float32,
    )  # fmt: skip
    assert np.isfinite(out).all()
    for i in range(b):
        n = lengths[i]
        new = np.tril(np.ones((t, t), bool))[:n]
        visible = np.concatenate([np.tile(np.arange(prefix_slots) < prefix_lengths[i], (n, 1)), new], 1)
        expected = attention_oracle(q[i, :n], k[i], v[i], visible, scale)
        assert relative_error(out[i, :n], expected) < PREFILL


@pytest.mark.parametrize("scores", ["equal", "one dominant key", "large"])
def test_prefill_attention_of_extreme_scores(scores):
    rng = np.random.default_rng(0)
    t, d = 32, 16
    q, k = rng.normal(size=(2, 1, t, 1, d))
    if scores == "equal":
        k[:] = k[:, :1]
    elif scores == "one dominant key":
        k[:, 3] *= 100
    else:
        q, k = q * 300, k * 300
    q8, q_scale = pk.quantize_fp8(jnp.asarray(q))
    k8, k_scale, k64 = in_blocks(k)
    v8, v_scale, v = in_blocks(rng.normal(size=(1, t, 1, d)))
    lengths = jnp.array([t], jnp.int32)
    out = pk.prefill_attention(
        q8, q_scale, k8, k_scale, pk.transpose_values(v8), v_scale, lengths, softmax_scale=d**-0.5,
        out_dtype=jnp.float32,
    )  # fmt: skip
    q64 = np.asarray(q8, np.float64) * np.asarray(q_scale, np.float64)[..., None]
    expected = attention_oracle(q64[0], k64[0], v[0], np.tril(np.ones((t, t), bool)), d**-0.5)
    assert relative_error(out[0], expected) < PREFILL


@pytest.mark.parametrize(("h", "kv", "d", "t"), [(4, 4, 16, 1), (6, 2, 32, 3), (8, 1, 64, 1)])
def test_decode_attention(h, kv, d, t):
    rng = np.random.default_rng(h)
    b, slots, scale = 3, 21, d**-0.5
    q8, q_scale, q = fp8(rng, (b, t, h, d), -1)
    k_codes, k_scales, k = int4_cache(rng, b, kv, slots, d)
    v_codes, v_scales, v = int4_cache(rng, b, kv, slots, d)
    positions = np.array([[0], [7], [slots - t]], np.int32) + np.arange(t, dtype=np.int32)
    out = pk.decode_attention(
        q8, q_scale, k_codes, k_scales, v_codes, v_scales, jnp.asarray(positions),
        softmax_scale=scale, out_dtype=jnp.float32,
    )  # fmt: skip
    for i in range(b):
        visible = np.arange(slots) <= positions[i][:, None]
        expected = attention_oracle(q[i], k[i], v[i], visible, scale)
        assert relative_error(out[i], expected) < BF16


def test_long_prompts_are_attended_in_blocks_without_changing_a_bit(monkeypatch):
    rng = np.random.default_rng(0)
    q8, q_scale, _ = fp8(rng, (2, 29, 4, 16), -1)
    k8, k_scale, _ = in_blocks(rng.normal(size=(2, 29, 2, 16)))
    v8, v_scale, _ = in_blocks(rng.normal(size=(2, 29, 2, 16)))
    v8 = pk.transpose_values(v8)
    lengths = jnp.array([29, 11], jnp.int32)

    def attend():
        return reference_attention.prefill_attention(
            q8, q_scale, k8, k_scale, v8, v_scale, lengths, softmax_scale=0.25, out_dtype=jnp.float32
        )

    whole = attend()
    monkeypatch.setattr(reference_attention, "QUERY_BLOCK", 8)
    np.testing.assert_allclose(attend(), whole, rtol=FLOAT32, atol=FLOAT32)


def test_dispatch_refuses_what_is_not_there():
    x8, x_scale = pk.quantize_fp8(jnp.ones((2, 64)))
    weight = [pk.pack_int4(jnp.ones((8, 64), jnp.int8)), jnp.ones((8, 2), jnp.bfloat16), jnp.float32(1)]
    with pytest.raises(NotImplementedError, match=r"no 'cutlass' implementation; it has .*reference"):
        pk.int4_fp8_matmul(x8, x_scale, *weight, implementation="cutlass")
    with pytest.raises(ValueError, match=r"codes must have shape \(8, 32\)"):
        pk.int4_fp8_matmul(x8, x_scale, weight[0][:, :16], *weight[1:])
    with pytest.raises(ValueError, match="scales must be float8_e4m3fn or bfloat16, got float32"):
        pk.int4_fp8_matmul(x8, x_scale, weight[0], weight[1].astype(jnp.float32), weight[2])
    with pytest.raises(ValueError, match="cannot be split into 3 groups"):
        pk.int4_fp8_matmul(x8, x_scale, weight[0], jnp.ones((8, 3), jnp.bfloat16), weight[2])
    with pytest.raises(ValueError, match="must be 'exact' or 'folded'"):
        pk.int4_fp8_matmul(x8, x_scale, *weight, numerics="rounded")
    with pytest.raises(ValueError, match="unknown operation 'conv'"):
        pk.implementations("conv")

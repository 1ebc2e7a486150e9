from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fireq_jax
from fireq_jax import numerics
from fireq_jax.numerics import round_weight, store_scales, tensor_scale_exponent
from fireq_jax.quantize import quantize_head
from pallas_kernels import unpack_int4


def nearest_grid_point(w, step):
    """Round-to-nearest in numpy: codes of [n, k] on the grid code * step, step [n, groups]."""
    steps = step.repeat(w.shape[1] // step.shape[1], 1)
    return np.clip(np.rint(w / steps), -8, 7), steps


@pytest.mark.parametrize("scales", ["sigma_fp8", "sigma_bf16"])
@pytest.mark.parametrize("group", [32, 128])
def test_weights_are_rounded_to_the_nearest_point_of_their_stored_grid(scales, group):
    w = np.random.default_rng(0).normal(size=(24, 256)).astype(np.float32) * 0.02
    w[3, :group] = 0
    w[5, 7] = 3.0  # an outlier
    packed, stored, tensor_scale = round_weight(jnp.asarray(w), group, fireq_jax.Recipe(scales=scales))
    assert stored.dtype == (jnp.float8_e4m3fn if scales == "sigma_fp8" else jnp.bfloat16)
    step = np.asarray(stored, np.float32) * float(tensor_scale)
    assert (step > 0).all()
    # the stored scale is the ideal one to within the precision of its type (e4m3 has 4 significant bits)
    ideal = np.abs(w).reshape(24, -1, group).max(-1) / 7
    occupied = ideal > 0
    np.testing.assert_allclose(step[occupied], ideal[occupied], rtol=2.0**-4 if scales == "sigma_fp8" else 2.0**-8)
    codes, steps = nearest_grid_point(w, step)
    # XLA may divide by multiplying with the reciprocal: a code may differ where w is half-way between two points
    differs = np.asarray(unpack_int4(packed)) != codes
    assert differs.mean() < 1e-3
    half_way = np.abs(np.abs(w / steps - np.floor(w / steps)) - 0.5)
    assert (half_way[differs] < 1e-4).all()


def test_small_weights_underflow_without_a_tensor_scale_and_none_does_with_it():
    # Weights of standard deviation 2^-11: group scales near 2^-12, below half the smallest e4m3 value of 2^-9
    w = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32) * 2.0**-11
    ideal = np.abs(w).reshape(64, 4, 128).max(-1) / 7
    assert (ideal.astype(ml_dtypes.float8_e4m3fn) == 0).mean() > 0.9

    def relative_error(rule):
        packed, stored, tensor_scale = round_weight(jnp.asarray(w), 128, fireq_jax.Recipe(tensor_scale=rule))
        step = np.asarray(stored, np.float32).repeat(128, 1) * float(tensor_scale)
        return np.linalg.norm(np.asarray(unpack_int4(packed)) * step - w) / np.linalg.norm(w)

    # int4 with groups of 128 normal values costs 11 %; a scale of 1 e4m3 step instead of 1.4 ... 0.3 costs all
    assert relative_error("none") > 0.5
    assert relative_error("fireq") < 0.2  # subnormal scales: one significant bit
    assert relative_error("largest") < 0.13

    for rule in ("fireq", "largest"):
        exponent = int(tensor_scale_exponent(jnp.asarray(ideal), rule, 448.0))
        scaled = np.ldexp(ideal, exponent).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
        assert (scaled > 0).all(), rule
        assert np.isfinite(scaled).all(), rule  # casting what is beyond 448 gives NaN


@given(st.integers(-100, 20), st.integers(0, 12))
def test_largest_tensor_scale_is_the_largest_that_fits(magnitude, spread):
    scales = np.ldexp(np.linspace(1, 1.9, 8, dtype=np.float32), magnitude - np.arange(8) * spread // 8)
    exponent = int(tensor_scale_exponent(jnp.asarray(scales), "largest", 448.0))
    assert np.ldexp(scales.max(), exponent) <= 448
    assert np.ldexp(scales.max(), exponent + 1) > 448 or exponent == 126


@pytest.mark.parametrize("numerics", ["exact", "folded"])
def test_folded_products_have_room_for_the_code(numerics):
    recipe = fireq_jax.Recipe(numerics=numerics)
    stored, _ = store_scales(jnp.asarray([[0.9, 0.001]]), recipe)
    largest = float(stored.astype(jnp.float32).max()) * 8
    assert (largest <= 448) == (numerics == "folded")


def test_zero_weights_stay_zero_with_scales_that_can_be_divided_by():
    packed, stored, tensor_scale = round_weight(jnp.zeros((4, 64)), 64, fireq_jax.Recipe())
    assert not np.asarray(packed).any()
    assert (np.asarray(stored, np.float32) > 0).all()
    assert float(tensor_scale) > 0


def test_quantize_replaces_linear_weights_and_nothing_else(tiny):
    _, params = tiny
    before = jax.tree.map(np.asarray, params)
    quantized = fireq_jax.quantize(params, "rtn")
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert fireq_jax.recipe_of(quantized) == fireq_jax.PRESETS["rtn"]
    assert fireq_jax.recipe_of(params) is None
    for name in ("embed", "final_norm", "lm_head"):
        jax.tree.map(np.testing.assert_array_equal, quantized[name], params[name])
    layer = quantized["layers_1"]
    for block, projections in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
        for projection in projections:
            weight = layer[block][projection]["kernel"]
            original = params["layers_1"][block][projection]["kernel"]
            assert isinstance(weight, fireq_jax.Int4Weight)
            weight.validate()
            assert weight.shape == original.shape
            error = np.linalg.norm(weight.dequantize() - original) / np.linalg.norm(original)
            assert 0.01 < error < 0.13  # int4 round-to-nearest of normal values in groups of 32 to 64 costs about 9 %


def test_group_sizes_fall_back_where_128_does_not_divide(tiny):
    layer = fireq_jax.quantize(tiny[1], "rtn")["layers_0"]
    assert layer["attention"]["q"]["kernel"].group_size == 64  # hidden size 64
    assert layer["mlp"]["down"]["kernel"].group_size == 32  # intermediate size 96


def test_quantised_linear_equals_float_linear_on_the_dequantised_weights(tiny):
    """The whole model with W4A16 and a float cache against the float model on dequantised weights."""
    model, params = tiny
    recipe = fireq_jax.Recipe(activations="none", kv_cache="float")
    quantized = fireq_jax.quantize(params, recipe)
    restored = jax.tree.map(
        lambda x: x.dequantize() if isinstance(x, fireq_jax.Int4Weight) else x,
        quantized,
        is_leaf=lambda x: isinstance(x, fireq_jax.Int4Weight),
    )
    tokens = np.arange(20)[None]
    expected = model.apply({"params": restored}, tokens)
    np.testing.assert_allclose(model.apply({"params": quantized}, tokens), expected, atol=1e-4)
    assert np.abs(expected - model.apply({"params": params}, tokens)).max() > 0.1


def test_output_projection_is_quantised_on_request(smollm2):
    model, params = smollm2
    quantized = fireq_jax.quantize(params, fireq_jax.Recipe(lm_head="int4", activations="none", kv_cache="float"))
    head = quantized["lm_head"]["kernel"]
    assert head.shape == params["embed"]["embedding"].shape
    tokens = np.array([[1, 520, 9531]])
    cache = fireq_jax.KVCache.zeros(model.config, 1, 3, "float", jnp.float32)
    plain = fireq_jax.quantize(params, fireq_jax.Recipe(activations="none", kv_cache="float"))
    logits = model.apply({"params": quantized}, tokens, None, cache)
    assert np.abs(logits - model.apply({"params": plain}, tokens, None, cache)).max() > 0.1


def test_output_projection_in_bytes(smollm2):
    """As the float model with that projection rounded; logits move by less the finer the codes."""
    model, params = smollm2
    plain = fireq_jax.Recipe(activations="none", kv_cache="float")
    embedding, tokens = np.asarray(params["embed"]["embedding"], np.float64), np.array([[1, 520, 9531]])

    def logits(pytree):
        return np.asarray(model.apply({"params": pytree}, tokens), np.float64)

    body = fireq_jax.quantize(params, plain)
    expected, moved = logits(body), []
    for kind in ("int8", "fp8", "int4"):
        head = quantize_head(params["embed"]["embedding"], replace(plain, lm_head=kind))
        with_head = {**body, "lm_head": {"kernel": head}}
        moved.append(np.linalg.norm(logits(with_head) - expected))
        if kind == "int4":
            break
        head.validate()
        assert head.shape == embedding.shape
        scales = np.asarray(head.scales, np.float64)[:, None]
        rounded = np.asarray(head.codes, np.float64) * scales
        # Half a step: of 1, or in e4m3 a unit of its four bits, but not less than its smallest number, 2^-9.
        half = scales / 2 if kind == "int8" else np.maximum(np.abs(embedding) / 16, scales / 2**10)
        assert np.all(np.abs(rounded - embedding) <= 1.001 * half)
        dense = {**body, "lm_head": {"kernel": jnp.asarray(rounded, jnp.float32)}}
        np.testing.assert_allclose(logits(with_head), logits(dense), atol=1e-4)  # float32 sums of 576 terms
    # Rounding errors of a Gaussian row's weights: 0.008, 0.026 and 0.1 of its deviation, root mean square.
    assert 0 < 2 * moved[0] < moved[1] < moved[2] / 2


@pytest.mark.parametrize(("kind", "largest"), [("fp8", 448), ("int8", 127)])
def test_outputs_of_zeros_in_bytes(kind, largest):
    weight = jnp.zeros((3, 8)).at[1].set(jnp.linspace(-1e-3, 2e-3, 8))
    codes, scales = numerics.round_to_bytes(weight, kind)
    fireq_jax.ByteWeight(codes, scales, (3,), (8,)).validate()
    assert not np.any(np.asarray(codes, np.float32)[[0, 2]])
    assert float(codes[1, -1]) == largest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": jnp.zeros((2, 8))}, "head: codes must be int8 or float8_e4m3fn"),
        ({"scales": jnp.ones(2, jnp.bfloat16)}, "head: scales must be float32"),
        ({"scales": jnp.array([1.0, 0.0])}, "head: a scale is not positive"),
        ({"codes": jnp.full((2, 8), jnp.nan, jnp.float8_e4m3fn)}, "a code is NaN"),
    ],
)
def test_damaged_byte_weights_are_refused(change, message):
    parts = {"codes": jnp.zeros((2, 8), jnp.float8_e4m3fn), "scales": jnp.ones(2)} | change
    with pytest.raises(ValueError, match=message):
        fireq_jax.ByteWeight(**parts, out_shape=(2,), in_shape=(8,)).validate("head")


def test_quantize_under_jit(tiny):
    _, params = tiny
    jitted = jax.jit(lambda p: fireq_jax.quantize(p, "rtn_bf16"))(params)
    assert fireq_jax.recipe_of(jitted).name == "rtn_bf16"
    jax.tree.map(np.testing.assert_array_equal, jitted, fireq_jax.quantize(params, "rtn_bf16"))


def test_quantising_twice_is_refused(tiny):
    quantized = fireq_jax.quantize(tiny[1])
    with pytest.raises(ValueError, match=r"quantised already \(recipe 'data_free'\)"):
        fireq_jax.quantize(quantized)
    quantized.pop("recipe")
    with pytest.raises(ValueError, match="quantised already"):
        fireq_jax.quantize(quantized)


def test_group_size_that_does_not_divide_is_refused(tiny):
    with pytest.raises(ValueError, match=r"layers_0/attention/q: k=64 is not divisible by group_size=48; it is by 64"):
        fireq_jax.quantize(tiny[1], fireq_jax.Recipe(group_size=48))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_weights_are_refused(tiny, bad):
    params = jax.tree.map(lambda x: x, tiny[1])
    kernel = params["layers_1"]["mlp"]["up"]["kernel"]
    params["layers_1"]["mlp"]["up"]["kernel"] = kernel.at[3, 4].set(bad)
    with pytest.raises(ValueError, match="layers_1/mlp/up holds NaN or infinity"):
        fireq_jax.quantize(params)


def test_unknown_preset_and_settings_are_refused(tiny):
    with pytest.raises(ValueError, match="unknown preset 'gptq'; known: rtn"):
        fireq_jax.quantize(tiny[1], "gptq")
    with pytest.raises(ValueError, match="lm_head=True must be one of float, int8, fp8, int4"):
        fireq_jax.Recipe(lm_head=True)
    with pytest.raises(ValueError, match="scales='int8' must be one of sigma_fp8, sigma_bf16"):
        fireq_jax.Recipe(scales="int8")
    with pytest.raises(ValueError, match="group_size=7 must be an even number"):
        fireq_jax.Recipe(group_size=7)


def test_something_else_than_a_llama_is_refused():
    with pytest.raises(ValueError, match="not those of a Llama"):
        fireq_jax.quantize({"dense": {"kernel": jnp.ones((4, 4))}})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("codes", np.zeros((8, 31), np.uint8), "codes of"),
        ("codes", np.zeros((8, 32), np.int8), "must be uint8"),
        ("scales", np.ones((8, 3), ml_dtypes.bfloat16), "scales must be"),
        ("scales", np.ones((8, 2), np.float32), "must be float8_e4m3fn or bfloat16"),
        ("scales", np.zeros((8, 2), ml_dtypes.bfloat16), "zero, NaN or infinite"),
        ("tensor_scale", np.float32(np.nan), "zero, NaN or infinite"),
        ("tensor_scale", np.ones(1, np.float32), "must be a float32 scalar"),
    ],
)
def test_validator_names_what_is_wrong(field, value, message):
    parts = {
        "codes": jnp.zeros((8, 32), jnp.uint8),
        "scales": jnp.ones((8, 2), jnp.bfloat16),
        "tensor_scale": jnp.float32(1),
    }
    fireq_jax.Int4Weight(**parts, out_shape=(8,), in_shape=(64,)).validate()
    with pytest.raises(ValueError, match=f"wq: .*{message}"):
        fireq_jax.Int4Weight(**(parts | {field: jnp.asarray(value)}), out_shape=(8,), in_shape=(64,)).validate("wq")

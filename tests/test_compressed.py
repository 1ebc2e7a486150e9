"""Checkpoints of the compressed-tensors package, against what the package itself packs and decompresses."""

import json
import warnings
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import write_checkpoint
from tiny_models import TOKENS, VARIANTS, state_dict

import convert
import fireq_jax
from convert.safetensors_file import open_file, write_file

GOLDEN = np.load(Path(__file__).parent / "golden" / "compressed.npz")
MODULES = {"q": "self_attn.q_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
SCALE_DTYPES = {"q": ml_dtypes.bfloat16, "up": np.float16, "down": np.float32}
# A model whose sizes vLLM's W4A8 kernels take.
WIDE = VARIANTS["llama3"] | {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4}


def scheme(group_size, strategy="group", inputs=None):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": strategy, "group_size": group_size}
    return {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}


def settings(*schemes, **changes):
    groups = {f"group_{i}": scheme for i, scheme in enumerate(schemes)}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups} | changes


def write_packed(folder, quantization_config, changes=None):
    """The tiny model with three weights of its first block as the package packed them."""
    weights = state_dict(VARIANTS["llama3"])
    for case, module in MODULES.items():
        name = f"model.layers.0.{module}"
        del weights[f"{name}.weight"]
        weights[f"{name}.weight_packed"] = GOLDEN[f"{case}.weight_packed"]
        weights[f"{name}.weight_scale"] = GOLDEN[f"{case}.scale"].astype(SCALE_DTYPES[case])
        weights[f"{name}.weight_shape"] = GOLDEN[f"{case}.weight_shape"]
    weights |= changes or {}
    config = VARIANTS["llama3"] | {"quantization_config": quantization_config}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_file(folder / "model.safetensors", {name: x for name, x in weights.items() if x is not None})
    return folder


UP = "model.layers.0.mlp.up_proj"
DECLARED = [scheme(32), scheme(64), scheme(None, "channel")]


def test_packed_weights_load_as_the_package_decompresses_them(tmp_path):
    with pytest.warns(UserWarning, match="scales were rounded to bfloat16") as caught:
        _, params = convert.load(write_packed(tmp_path / "in", settings(*DECLARED)))
    assert {str(w.message).split("model.layers.0.")[1].split(".weight")[0] for w in caught} == {
        "mlp.up_proj",
        "mlp.down_proj",
    }
    layer = params["layers_0"]
    for case, weight in (("q", layer["attention"]["q"]), ("up", layer["mlp"]["up"]), ("down", layer["mlp"]["down"])):
        values = np.asarray(weight["kernel"].dequantize()).reshape(GOLDEN[f"{case}.codes"].shape)
        expected = GOLDEN[f"{case}.decompressed"]
        if case == "q":  # the package multiplies in the scale's dtype
            np.testing.assert_array_equal(values.astype(ml_dtypes.bfloat16).astype(np.float32), expected)
        else:  # half a unit of a scale's 8 bits, and of the package's product in 11 or 24
            np.testing.assert_allclose(values, expected, rtol=2**-8 + 2**-11)
    assert layer["mlp"]["down"]["kernel"].group_size == 32  # one scale per output became one per group
    recipe = fireq_jax.recipe_of(params)
    assert (recipe.name, recipe.activations, recipe.kv_cache) == ("compressed-tensors", "none", "float")
    np.testing.assert_array_equal(
        params["layers_1"]["mlp"]["up"]["kernel"], state_dict(VARIANTS["llama3"])["model.layers.1.mlp.up_proj.weight"]
    )


def test_exported_words_are_those_the_package_packs(tmp_path, tiny):
    model, params = tiny
    params = fireq_jax.quantize(params, fireq_jax.Recipe(group_size=32))
    codes = (GOLDEN["q.codes"] & 15).astype(np.uint8)
    weight = fireq_jax.Int4Weight(
        jnp.asarray(codes[:, ::2] | codes[:, 1::2] << 4),
        jnp.asarray(GOLDEN["q.scale"], jnp.bfloat16),
        jnp.float32(1),
        (4, 16),
        (64,),
    )
    params["layers_0"]["attention"]["q"] = {"kernel": weight}
    convert.export_compressed_tensors(tmp_path / "out", model, params, activations="none")
    tensors = open_file(tmp_path / "out" / "model.safetensors").tensors
    name = "model.layers.0.self_attn.q_proj"
    for part in ("weight_packed", "weight_shape"):
        stored = tensors[f"{name}.{part}"].read()
        assert stored.dtype == GOLDEN[f"q.{part}"].dtype
        np.testing.assert_array_equal(stored, GOLDEN[f"q.{part}"])
    scales = tensors[f"{name}.weight_scale"].read()
    assert scales.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(scales.astype(np.float32), GOLDEN["q.scale"])
    assert f"{name}.weight" not in tensors


HEADS = [fireq_jax.Recipe(lm_head="int4"), fireq_jax.Recipe(lm_head="fp8"), fireq_jax.Recipe(lm_head="int8")]


@pytest.mark.parametrize("recipe", ["data_free", "rtn_bf16", *HEADS], ids=str)
def test_an_export_comes_back_as_the_same_weights(tmp_path, recipe):
    model, params = convert.load(write_checkpoint(tmp_path / "in", WIDE))
    quantized = fireq_jax.quantize(params, recipe)
    convert.export_compressed_tensors(tmp_path / "out", model, quantized)
    again, restored = convert.load(tmp_path / "out")
    assert again.config == model.config
    recipe = fireq_jax.recipe_of(restored)
    assert (recipe.activations, recipe.group_size, recipe.scales) == ("fp8", (128,), "sigma_bf16")
    for block in ("layers_0", "layers_1"):
        for half, projections in (("attention", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for projection in projections:
                ours, theirs = (p[block][half][projection]["kernel"] for p in (quantized, restored))
                np.testing.assert_array_equal(ours.dequantize(), theirs.dequantize())
    head, exported = (p["lm_head"]["kernel"] for p in (quantized, restored))
    if isinstance(head, fireq_jax.ByteWeight):  # as an unquantised weight
        np.testing.assert_array_equal(exported, head.dequantize(model.dtype))
    convert.save(tmp_path / "native", again, restored)
    saved = convert.load(tmp_path / "native")[1]
    codes = [p["layers_1"]["mlp"]["up"]["kernel"].codes for p in (saved, restored)]
    np.testing.assert_array_equal(*codes)


def test_what_is_left_out_behind_the_rotation_does_not_change_the_logits(tmp_path):
    """Scales, offset and rotation of keys cancel in the scores; an export without them computes the same model."""
    model, params = convert.load(write_checkpoint(tmp_path / "in", WIDE))
    recipe = fireq_jax.Recipe(
        keys="hadamard", values="hadamard", smoothing="mean", activations="none", kv_cache="float"
    )
    quantized = fireq_jax.quantize(params, recipe)
    assert "key_offset" in quantized["layers_0"]["attention"]
    convert.export_compressed_tensors(tmp_path / "out", model, quantized)
    again, restored = convert.load(tmp_path / "out")
    assert "key_offset" not in restored["layers_0"]["attention"]
    expected = model.apply({"params": quantized}, TOKENS)
    # float32 throughout: what is left is the rounding of two orders of multiplication
    np.testing.assert_allclose(again.apply({"params": restored}, TOKENS), expected, rtol=1e-4, atol=1e-4)


def test_the_config_says_what_vllm_needs(tmp_path):
    model, params = convert.load(write_checkpoint(tmp_path / "in", WIDE))
    convert.export_compressed_tensors(tmp_path / "out", model, fireq_jax.quantize(params, "rtn"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = config["quantization_config"]
    assert (found["quant_method"], found["format"], found["ignore"]) == (
        "compressed-tensors",
        "pack-quantized",
        ["lm_head"],
    )
    [group] = found["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"]["group_size"] == 128
    assert group["input_activations"] == {
        "num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True
    }  # fmt: skip


def test_weights_that_vllm_cannot_take_are_refused_or_written_as_w4a16(tmp_path, tiny):
    model, params = tiny
    quantized = fireq_jax.quantize(params, "rtn")  # groups of 64 and 32
    with pytest.raises(ValueError, match=r"q_proj.weight is \(64, 64\) in groups of 64; .* Pass activations='none'"):
        convert.export_compressed_tensors(tmp_path / "out", model, quantized)
    convert.export_compressed_tensors(tmp_path / "out", model, quantized, activations="none")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [g["weights"]["group_size"] for g in groups.values()] == [64, 32]
    assert "model.layers.1.mlp.down_proj" in groups["group_1"]["targets"]
    assert [g["input_activations"] for g in groups.values()] == [None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored = convert.load(tmp_path / "out")[1]
    kernels = [p["layers_0"]["mlp"]["down"]["kernel"].dequantize() for p in (restored, quantized)]
    np.testing.assert_array_equal(*kernels)
    with pytest.raises(ValueError, match="params hold no int4 weights"):
        convert.export_compressed_tensors(tmp_path / "other", model, params)
    with pytest.raises(ValueError, match="activations='int8' must be"):
        convert.export_compressed_tensors(tmp_path / "other", model, quantized, activations="int8")


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (settings(*DECLARED, format="nvfp4-pack-quantized"), {}, "format='nvfp4-pack-quantized', which this library"),
        (settings(*DECLARED, kv_cache_scheme={"num_bits": 8}), {}, "has kv_cache_scheme="),
        (settings(*DECLARED, transform_config={"config_groups": {"R1": {}}}), {}, "has transform_config="),
        (settings(), {}, "has config_groups={}"),
        (settings(scheme(32), scheme(64) | {"weights": {"num_bits": 8}}), {}, r"= \(8, None, None\)"),
        (settings(scheme(32) | {"weights": scheme(32)["weights"] | {"symmetric": False}}), {}, r"\(4, 'int', False\)"),
        (settings(scheme(0)), {}, "has group_size=0"),
        (settings(*DECLARED, scheme(32, inputs={"num_bits": 8, "type": "int"})), {}, r"activations of .* = \(8, 'int'"),
        (settings(scheme(16)), {}, "q_proj.weight with 64 inputs has 2 scales per output; .* declares groups of 16"),
        (
            settings(*DECLARED),
            {"model.layers.0.mlp.up_proj.weight_shape": np.array([96, 32])},
            r"weight_shape \[96, 32\]",
        ),
        (settings(*DECLARED), {"model.layers.0.mlp.up_proj.weight_scale": None}, "has 0 scales per output"),
        (settings(*DECLARED), {"model.layers.0.mlp.up_proj.weight_g_idx": np.zeros(64, np.int32)}, "permuted groups"),
        (
            settings(*DECLARED),
            {"model.layers.1.mlp.up_proj.weight": None},
            "1 missing: model.layers.1.mlp.up_proj.weight",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(tmp_path, config, changes, message):
    with pytest.raises(ValueError, match=message):
        convert.load(write_packed(tmp_path / "in", config, changes))


def test_other_quantisation_methods_are_refused(tmp_path):
    config = VARIANTS["llama3"] | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    with pytest.raises(ValueError, match="already quantised .*quant_method='gptq'"):
        convert.load(write_checkpoint(tmp_path / "in", config))

import json
import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import write_checkpoint
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file
from tiny_models import TOKENS, VARIANTS, state_dict

import convert
import fireq_jax
from convert.tensors import tensor_table
from fireq_jax import scaling
from fireq_jax.config import LlamaConfig, RopeConfig


def assert_same_tree(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    jax.tree.map(lambda a, b: None if a.dtype == b.dtype else pytest.fail(f"{a.dtype} != {b.dtype}"), actual, expected)


def write_shards(folder: Path, config: dict) -> None:
    weights = state_dict(config)
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in shards.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_and_single_file_checkpoints_load_the_same(tmp_path, tiny):
    write_shards(tmp_path / "sharded", VARIANTS["llama3"])
    _, params = convert.load(tmp_path / "sharded")
    assert_same_tree(params, tiny[1])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_keep_their_stored_dtype_or_take_the_asked_one(tmp_path, dtype):
    config = VARIANTS["llama3"]
    weights = {name: value.astype(dtype) for name, value in state_dict(config).items()}
    folder = write_checkpoint(tmp_path, config, weights)
    model, params = convert.load(folder)
    assert model.dtype == dtype
    np.testing.assert_array_equal(params["embed"]["embedding"], weights["model.embed_tokens.weight"])
    model, params = convert.load(folder, dtype="bfloat16")
    assert model.dtype == jnp.bfloat16
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
    with pytest.raises(ValueError, match="dtype=int32 must be one of float32"):
        convert.load(folder, dtype="int32")


def test_generation_config_names_the_tokens_that_end_a_turn(checkpoint):
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert convert.load(checkpoint)[0].config.eos_token_ids == (2, 7)


def test_derived_buffers_and_a_tied_heads_copy_are_ignored(tmp_path):
    config = VARIANTS["smollm2"]
    weights = state_dict(config)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(16, np.float32)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    _, params = convert.load(write_checkpoint(tmp_path, config, weights))
    assert "lm_head" not in params


def test_all_wrong_tensors_are_named_at_once(tmp_path):
    weights = state_dict(VARIANTS["llama3"])
    del weights["model.layers.0.mlp.up_proj.weight"]
    weights["model.layers.1.self_attn.q_proj.weight"] = np.zeros((64, 32), np.float32)
    weights["model.layers.1.self_attn.q_norm.weight"] = np.zeros(16, np.float32)
    with pytest.raises(ValueError, match="does not hold the tensors") as error:
        convert.load(write_checkpoint(tmp_path, VARIANTS["llama3"], weights))
    message = str(error.value)
    assert "1 missing: model.layers.0.mlp.up_proj.weight" in message
    assert "1 unexpected: model.layers.1.self_attn.q_norm.weight" in message
    assert "model.layers.1.self_attn.q_proj.weight (is (64, 32), must be (64, 64))" in message


def test_integer_weights_are_refused(tmp_path):
    weights = {name: value.astype(np.int8) for name, value in state_dict(VARIANTS["llama3"]).items()}
    with pytest.raises(ValueError, match="weights must be float32, float16, bfloat16, found int8"):
        convert.load(write_checkpoint(tmp_path, VARIANTS["llama3"], weights))


def test_missing_shards_are_named(tmp_path):
    write_shards(tmp_path, VARIANTS["llama3"])
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shards that are not there: model-00002-of-00002.safetensors"):
        convert.load(tmp_path)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    write_shards(tmp_path / "model", VARIANTS["llama3"])
    index = tmp_path / "model" / "model.safetensors.index.json"
    shutil.copy(tmp_path / "model" / "model-00001-of-00002.safetensors", tmp_path / "other.safetensors")
    index.write_text(index.read_text().replace("model-00001-of-00002", "../other"))
    with pytest.raises(ValueError, match=r"'../other.safetensors', which is not a plain file name"):
        convert.load(tmp_path / "model")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000])
def test_truncated_safetensors_are_refused(checkpoint, keep):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        convert.load(checkpoint)


def test_pickles_are_refused_unopened(tmp_path):
    class Boom:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    (tmp_path / "config.json").write_text(json.dumps(VARIANTS["llama3"]))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Boom()))
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match="pickle format are refused"):
            convert.load(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"\['GPT2LMHeadModel'\] is not a Llama; supported: LlamaForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "is not a Llama"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' lacks 'low_freq_factor'"),
        ({"quantization_config": {"quant_method": "awq"}}, "already quantised .*'awq'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"num_key_value_heads": 3}, "num_heads=4 must be divisible by self.num_kv_heads=3"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers='two' must be an integer, 1 or more"),
    ],
)
def test_other_models_are_refused_by_name(checkpoint, change, message):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        convert.load(checkpoint)


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist here and is no hub id"):
        convert.load(tmp_path / "a" / "b" / "c")
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        convert.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(VARIANTS["llama3"]))
    with pytest.raises(FileNotFoundError, match="holds no safetensors file"):
        convert.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        convert.load(tmp_path)
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(ValueError, match="neither a folder with config.json"):
        convert.load(tmp_path / "notes.md")


def test_hub_ids_come_from_the_hub_cache(tmp_path, monkeypatch):
    """A repository laid out as huggingface_hub caches it loads in offline mode, and another one does not."""
    import huggingface_hub.constants as constants

    commit = "0" * 40
    repo = tmp_path / "models--org--tiny"
    write_checkpoint(repo / "snapshots" / commit, VARIANTS["llama3"])
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model, _ = convert.load("org/tiny")
    assert model.config.num_layers == 2
    with pytest.raises(OSError, match="offline|outgoing|cache"):
        convert.load("org/absent")


def test_sliding_window_limits_the_positions():
    config = VARIANTS["mistral"] | {"sliding_window": 32}
    assert LlamaConfig.from_hf(config).max_positions == 32


@pytest.mark.parametrize("variant", VARIANTS)
def test_configs_survive_their_own_json(variant):
    config = LlamaConfig.from_hf(VARIANTS[variant])
    assert LlamaConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """Row order of llama.cpp's converter: the rotary halves of each head interleaved."""
    rows = np.arange(w.shape[0]).reshape(heads, 2, -1)
    return w[np.stack([rows[:, 0], rows[:, 1]], axis=-1).reshape(-1)]


def write_gguf(path: Path, config: dict, kind: GGMLQuantizationType = GGMLQuantizationType.F32) -> dict:
    """Writes a GGUF file as llama.cpp's converter would; returns the weights it stands for."""
    weights = state_dict(config)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    whole["lm_head.weight"] = "output.weight"
    for name, w in weights.items():
        parts = name.split(".")
        module = ".".join(parts[3:-1])
        target = whole.get(name) or f"blk.{parts[2]}.{names[module]}.weight"
        if module in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"]
            w = permute(w, heads)
        if w.ndim == 2 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(target, quantize(w, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, w)
    if config.get("rope_scaling"):
        factors = np.linspace(1, 8, config["hidden_size"] // config["num_attention_heads"] // 2, dtype=np.float32)
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_gguf_and_safetensors_give_the_same_model(tmp_path, tiny):
    write_gguf(tmp_path / "tiny.gguf", VARIANTS["llama3"])
    model, params = convert.load(tmp_path / "tiny.gguf", dtype="float32")
    assert_same_tree(params, tiny[1])
    logits = model.apply({"params": params}, TOKENS)
    np.testing.assert_allclose(logits, tiny[0].apply({"params": tiny[1]}, TOKENS), atol=1e-5)


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.F16])
def test_quantised_gguf_is_dequantised_as_the_gguf_package_does(tmp_path, kind):
    weights = write_gguf(tmp_path / "tiny.gguf", VARIANTS["llama3"], kind)
    _, params = convert.load(tmp_path / "tiny.gguf", dtype="float32")
    name = "model.layers.1.mlp.down_proj.weight"
    expected = dequantize(quantize(weights[name], kind), kind)
    np.testing.assert_array_equal(params["layers_1"]["mlp"]["down"]["kernel"], expected)


def test_gguf_rope_factors_divide_the_frequencies(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", VARIANTS["llama31"])
    config = convert.load(tmp_path / "tiny.gguf")[0].config
    plain = RopeConfig(theta=500000.0).inverse_frequencies(16)
    np.testing.assert_allclose(
        config.rope.inverse_frequencies(16), plain / np.linspace(1, 8, 8, dtype=np.float32), rtol=1e-6
    )


@pytest.mark.parametrize("keep", [3, 200, 20000])
def test_truncated_gguf_is_refused(tmp_path, keep):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, VARIANTS["llama3"])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="tiny.gguf is not a whole GGUF file"):
        convert.load(path)


@pytest.mark.smollm2
def test_embedded_model_is_what_its_file_says(smollm2):
    model, params = smollm2
    tensors = {t.name: t for t in GGUFReader(convert.embedded_model()).tensors}
    up = tensors["blk.7.ffn_up.weight"]
    np.testing.assert_array_equal(params["layers_7"]["mlp"]["up"]["kernel"], dequantize(up.data, up.tensor_type))
    assert model.config.num_layers == 30
    assert len(tensor_table(model.config)) == len(tensors)


HEADS = [
    fireq_jax.Recipe(lm_head="int4", group_size=32),
    fireq_jax.Recipe(lm_head="fp8"),
    fireq_jax.Recipe(lm_head="int8"),
]


@pytest.mark.parametrize("recipe", [None, "rtn", "rtn_bf16", *HEADS], ids=str)
@pytest.mark.parametrize("variant", ["biases", "smollm2"])
def test_checkpoints_round_trip_bit_for_bit(tmp_path, variant, recipe):
    model, params = convert.load(write_checkpoint(tmp_path / "in", VARIANTS[variant]), dtype="bfloat16")
    scales = jnp.linspace(0.1, 3, model.config.num_kv_heads * model.config.head_dim, dtype=jnp.float32)
    scales = scales.reshape(model.config.num_kv_heads, model.config.head_dim)
    params["layers_1"] = scaling.scale_keys_after_rope(params["layers_1"], scales)
    if recipe is not None:
        params = fireq_jax.quantize(params, recipe)
    convert.save(tmp_path / "out", model, params)
    again, restored = convert.load(tmp_path / "out")
    assert again == model
    assert_same_tree(restored, params)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_large_checkpoints_are_sharded(tmp_path, tiny, monkeypatch):
    import convert.shards as module

    monkeypatch.setattr(module, "SHARD_BYTES", 50_000)
    params = fireq_jax.quantize(tiny[1])
    convert.save(tmp_path / "out", tiny[0], params)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert_same_tree(convert.load(tmp_path / "out")[1], params)


def test_saving_over_something_needs_to_be_asked_for(tmp_path, tiny):
    model, params = tiny
    convert.save(tmp_path / "out", model, params)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        convert.save(tmp_path / "out", model, params)
    convert.save(tmp_path / "out", model, fireq_jax.quantize(params), overwrite=True)
    assert fireq_jax.recipe_of(convert.load(tmp_path / "out")[1]).name == "data_free"


def test_a_save_that_fails_leaves_the_old_checkpoint(tmp_path, tiny, monkeypatch):
    import convert.safetensors_file as module

    model, params = tiny
    convert.save(tmp_path / "out", model, params)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    monkeypatch.setattr(module, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        convert.save(tmp_path / "out", model, fireq_jax.quantize(params), overwrite=True)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "checkpoint format 99 was written by fireq-jax .* reads format"),
        ({"recipe": {"name": "x"}}, "the recipe has the fields"),
        ({"layout": "columns"}, "layout 'columns' is unknown; this version reads 'rows'"),
        ({"checkpoint_id": "x"}, "model.safetensors is of checkpoint [0-9a-f]{32}, config.json of x"),
        ({"scale_dtype": "bfloat16"}, "has float8_e4m3fn scales, config.json says bfloat16"),
        ({"group_sizes": {}}, "group_sizes has None for self_attn.q_proj, which has 64 inputs"),
    ],
)
def test_quantised_checkpoints_of_another_format_are_refused(tmp_path, tiny, change, message):
    convert.save(tmp_path / "out", tiny[0], fireq_jax.quantize(tiny[1]))
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["fireq"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        convert.load(tmp_path / "out")


def test_an_output_projection_of_another_type_is_refused(tmp_path, tiny):
    convert.save(tmp_path / "out", tiny[0], fireq_jax.quantize(tiny[1], fireq_jax.Recipe(lm_head="int8")))
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["fireq"]["recipe"]["lm_head"] = "fp8"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lm_head.weight has int8 codes, the recipe says fp8"):
        convert.load(tmp_path / "out")


def test_quantised_checkpoints_with_other_codes_are_refused(tmp_path, tiny):
    from convert.safetensors_file import open_file, write_file

    convert.save(tmp_path / "out", tiny[0], fireq_jax.quantize(tiny[1]))
    file = open_file(tmp_path / "out" / "model.safetensors")
    tensors = {name: np.array(x.read()) for name, x in file.tensors.items()}

    def load_with(name, value):
        write_file(file.path, {**tensors, name: value}, file.metadata)
        convert.load(tmp_path / "out")

    module = "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=rf"{module}.codes \(is \(96, 31\), must be \(96, 32\)\)"):
        load_with(f"{module}.codes", tensors[f"{module}.codes"][:, :-1])
    with pytest.raises(ValueError, match=f"{module}.weight: codes of .* must be uint8"):
        load_with(f"{module}.codes", tensors[f"{module}.codes"].astype(np.int8))
    scales = tensors[f"{module}.scales"].copy()
    scales[3, 0] = np.nan
    with pytest.raises(ValueError, match=f"{module}.weight: a scale is zero, NaN or infinite"):
        load_with(f"{module}.scales", scales)
    norm = tensors["model.norm.weight"].copy()
    norm[0] = np.inf
    with pytest.raises(ValueError, match=r"\['final_norm'\]\['scale'\] holds NaN or infinity"):
        load_with("model.norm.weight", norm)


def test_models_of_another_size_do_not_take_quantised_weights(tiny):
    _, params = tiny
    other = fireq_jax.Llama(LlamaConfig.from_hf(VARIANTS["llama3"] | {"num_key_value_heads": 4}), dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"k: the weight maps \(64,\) to \(2, 16\), the model needs"):
        other.apply({"params": fireq_jax.quantize(params, "rtn")}, TOKENS)
    with pytest.raises(ValueError, match=r"post_rope_scale is \(2, 16\), the model needs \(4, 16\)"):
        other.apply({"params": fireq_jax.quantize(params)}, TOKENS)

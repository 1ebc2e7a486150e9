"""Damaged, hostile and mixed files: an error that a user can read, or the very model that was saved.

Real checkpoints of three kinds are mutated. What may not happen: another exception, a crash, a hang, or parameters that
differ from those that were written.
"""

import contextlib
import json
import os
import shutil
import struct
from copy import deepcopy

import jax
import numpy as np
import pytest
from conftest import write_checkpoint
from gguf import GGUFReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_convert import write_gguf
from tiny_models import VARIANTS

import convert
import fireq_jax
from fireq_jax import LlamaConfig

# What bad input may raise: the command line turns each of them into one line.
REFUSALS = (ValueError, OSError, NotImplementedError)
KINDS = ["float", "int4", "packed"]
fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Per kind: the folder, in shards, and what it loads as."""
    import convert.shards as shards

    root = tmp_path_factory.mktemp("originals")
    config = VARIANTS["llama3"] | {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 16, "eos_token_id": [2, 3]}
    model, params = convert.load(write_checkpoint(root / "in", config), dtype="bfloat16")
    before, shards.SHARD_BYTES = shards.SHARD_BYTES, 6_000
    try:
        convert.save(root / "float", model, params)
        convert.save(root / "int4", model, fireq_jax.quantize(params))
        quantized = fireq_jax.quantize(params, fireq_jax.Recipe(activations="none"))
        convert.export_compressed_tensors(root / "packed", model, quantized)
    finally:
        shards.SHARD_BYTES = before
    for kind in KINDS:
        assert len(list((root / kind).glob("*.safetensors"))) > 1
    return {kind: (root / kind, *convert.load(root / kind)) for kind in KINDS}


def copy(original, tmp_path):
    target = tmp_path / "mutated"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(original, target)
    return target


def check(folder, params):
    """Loads the folder, which must be refused, or hold ``params``."""
    try:
        _, found = convert.load(folder)
    except REFUSALS:
        return "refused"
    assert jax.tree.structure(found) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    return "loaded"


def read_header(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(path, text, payload):
    text = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)


SIZES = st.one_of(st.integers(-2, 70), st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, 10**30]))
# Copies: a test that changes what it drew must not change what it draws next.
NASTY = st.one_of(
    st.none(), st.booleans(), SIZES, st.floats(), st.text(max_size=6), st.lists(SIZES, max_size=4),
    st.sampled_from([{}, [], [[]], {"a": {}}, "../x", "/etc/passwd", "\0", "F8_E4M3", "I32", "U8", "BF16", "F64", 0.5]),
).map(deepcopy)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(data=st.data())
def test_entries_of_a_header_are_not_believed(tmp_path, originals, kind, data):
    original, _, params = originals[kind]
    folder = copy(original, tmp_path)
    path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    header, payload = read_header(path)
    name = data.draw(st.sampled_from(sorted(header)))
    action = data.draw(st.sampled_from(["field", "entry", "drop", "rename", "swap", "twice", "shift"]))
    if action == "field":
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets", "crc32", "format", "fireq_checkpoint_id"]))
        if isinstance(header[name].get(field), list) and data.draw(st.booleans()):
            place = data.draw(st.integers(0, 3))
            header[name][field][place : place + 1] = [data.draw(SIZES)]
        else:
            header[name][field] = data.draw(NASTY)
    elif action == "entry":
        header[name] = data.draw(NASTY)
    elif action == "drop":
        del header[name]
    elif action == "rename":
        header[data.draw(st.text(max_size=5))] = header.pop(name)
    elif action == "swap":  # two tensors under each other's name
        other = data.draw(st.sampled_from(sorted(header)))
        header[name], header[other] = header[other], header[name]
    elif action == "shift" and "data_offsets" in header[name]:
        amount = data.draw(st.integers(-64, 64))
        header[name]["data_offsets"] = [x + amount for x in header[name]["data_offsets"]]
    text = json.dumps(header)
    if action == "twice":
        text = (
            text[:-1]
            + ","
            + json.dumps(name)
            + ":"
            + json.dumps(header[data.draw(st.sampled_from(sorted(header)))])
            + "}"
        )
    write_header(path, text, payload)
    check(folder, params)


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(data=st.data())
def test_bytes_of_a_shard_are_not_believed(tmp_path, originals, kind, data):
    original, _, params = originals[kind]
    folder = copy(original, tmp_path)
    path = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors"))))
    raw = bytearray(path.read_bytes())
    header_end = 8 + struct.unpack("<Q", raw[:8])[0]
    action = data.draw(st.sampled_from(["length", "header", "payload", "cut", "longer", "hole"]))
    if action == "length":
        raw[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1) | st.integers(0, len(raw) + 64)))
    elif action in ("header", "payload"):
        low, high = (8, header_end - 1) if action == "header" else (header_end, len(raw) - 1)
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(low, high))] ^= data.draw(st.integers(1, 255))
    elif action == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    elif action == "longer":
        raw += data.draw(st.binary(min_size=1, max_size=64))
    else:
        at = data.draw(st.integers(header_end, len(raw) - 1))
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=16))
    path.write_bytes(raw)
    check(folder, params)


def places(tree, path=()):
    """Paths to every value of a JSON object."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("kind", KINDS)
@fuzz
@given(data=st.data())
def test_values_of_the_config_are_not_believed(tmp_path, originals, kind, data):
    original, _, params = originals[kind]
    folder = copy(original, tmp_path)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, last = data.draw(st.sampled_from(list(places(config))))
        node = config
        for key in parents:
            node = node[key]
        if isinstance(node, dict) and data.draw(st.booleans()):
            del node[last]
        else:
            node[last] = data.draw(NASTY)
    file.write_text(json.dumps(config))
    try:
        model, found = convert.load(folder)
    except REFUSALS:
        return
    # What the file now describes may be another way to compute with the weights, but they are those that were saved.
    config.pop("quantization_config", None)
    assert model.config == LlamaConfig.from_hf(config)
    saved = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(params)}
    for path, x in jax.tree.leaves_with_path(found):
        expected = saved[jax.tree_util.keystr(path)]
        np.testing.assert_array_equal(x, expected.reshape(x.shape).astype(x.dtype))


@fuzz
@given(data=st.data())
def test_an_index_is_not_believed(tmp_path, originals, data):
    original, _, params = originals["int4"]
    folder = copy(original, tmp_path)
    shutil.copyfile(folder / sorted(p.name for p in folder.glob("*.safetensors"))[0], tmp_path / "outside.safetensors")
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    names = st.sampled_from(sorted(index["weight_map"]))
    outside = st.sampled_from(
        ["../outside.safetensors", str(tmp_path / "outside.safetensors"), "x/../../outside.safetensors"]
    )
    action = data.draw(st.sampled_from(["name", "all", "map", "text"]))
    if action == "name":
        index["weight_map"][data.draw(names)] = data.draw(outside | NASTY)
    elif action == "all":
        index["weight_map"] = dict.fromkeys(index["weight_map"], data.draw(outside))
    elif action == "map":
        index["weight_map"] = data.draw(NASTY)
    text = json.dumps(index)
    if action == "text":
        text = data.draw(st.sampled_from(["", "{", "[]", "[" * 100_000, '{"weight_map": {"a": NaN}}']))
    file.write_text(text)
    check(folder, params)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_another_checkpoint_are_not_mixed_in(tmp_path, originals, kind):
    """Every shard of a second checkpoint with other weights, in place of the first one's."""
    original, model, params = originals[kind]
    folder = copy(original, tmp_path)
    if kind == "int4":
        convert.save(tmp_path / "other", model, params)
        other = tmp_path / "other"
        loaded = [shutil.copyfile(other / p.name, p) for p in other.glob("*.safetensors") if (folder / p.name).exists()]
        assert not loaded  # the second one is in one file, so the folder has two kinds of names
        shutil.copyfile(other / "model.safetensors", sorted(folder.glob("*.safetensors"))[0])
        assert check(folder, params) == "refused"
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    shutil.copyfile(first, second)
    assert check(folder, params) == "refused"


def test_links_and_special_files(tmp_path, originals):
    original, _, params = originals["int4"]
    folder = copy(original, tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[0]
    moved = shard.rename(tmp_path / "blob")
    shard.symlink_to(moved)  # as the hub's cache has it
    assert check(folder, params) == "loaded"
    for make in (
        lambda: shard.symlink_to(shard),
        lambda: shard.symlink_to(tmp_path / "nothing"),
        lambda: shard.symlink_to("/dev/zero"),
        lambda: os.mkfifo(shard),  # opening one would wait for ever
        shard.mkdir,
    ):
        shard.unlink()
        make()
        assert check(folder, params) == "refused"


def test_a_file_that_claims_a_huge_header_or_shape_is_refused_without_the_memory(tmp_path, originals):
    original, _, params = originals["float"]
    folder = copy(original, tmp_path)
    path = sorted(folder.glob("*.safetensors"))[0]
    header, payload = read_header(path)
    name = next(n for n in header if n != "__metadata__")
    for shape in ([2**40, 2**20], [2**63, 2], [2**31] * 3):
        header[name]["shape"] = shape
        write_header(path, json.dumps(header), payload)
        assert check(folder, params) == "refused"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert check(folder, params) == "refused"
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"):
        (folder / "config.json").write_text(json.dumps(config | {key: 2**40}))
        assert check(folder, params) == "refused"


@fuzz
@given(data=st.data())
def test_bytes_of_a_gguf_header_are_not_believed(tmp_path, data):
    """GGUF has no checksums, so only what stands before the weights can be told to be wrong."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, VARIANTS["llama3"])
    raw = bytearray(path.read_bytes())
    weights = int(GGUFReader(path).tensors[0].data_offset)
    action = data.draw(st.sampled_from(["flip", "cut", "count"]))
    if action == "flip":
        for _ in range(data.draw(st.integers(1, 3))):
            raw[data.draw(st.integers(0, weights - 1))] ^= data.draw(st.integers(1, 255))
    elif action == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    else:  # tensors, metadata fields, or any eight bytes, which may be the length of a string or an array
        at = data.draw(st.sampled_from([8, 16]) | st.integers(24, weights - 8))
        raw[at : at + 8] = struct.pack("<Q", data.draw(st.sampled_from([0, 2**20, 2**31, 2**40, 2**63, 2**64 - 1])))
    path.write_bytes(raw)
    with contextlib.suppress(*REFUSALS):
        model, _ = convert.load(path)
        assert model.config.num_layers == 2


def test_a_gguf_file_that_claims_many_layers_is_refused_at_once(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, VARIANTS["llama3"])
    count = b"llama.block_count" + struct.pack("<II", 4, 2)  # type u32, value 2
    raw = path.read_bytes()
    assert raw.count(count) == 1
    path.write_bytes(raw.replace(count, count[:-4] + struct.pack("<I", 2**31)))
    with pytest.raises(ValueError, match="speaks of 2147483648 layers, it holds 21 tensors"):
        convert.load(path)


def test_a_gguf_array_that_claims_more_than_the_file_is_refused_at_once(tmp_path):
    """The gguf package's reader would collect its items, empty ones, until memory ends."""
    path = tmp_path / "tiny.gguf"
    key = b"llama.block_count"
    array = struct.pack("<IIQ", 9, 4, 2**40)  # an array of u32
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + array)
    with pytest.raises(ValueError, match=r"is not a whole GGUF file \(4398046511104 bytes are claimed at byte"):
        convert.load(path)

"""Int4 weights in the layouts that kernels read: the same weights, bit for bit, and the same model."""

import jax
import numpy as np
import pytest
from conftest import write_checkpoint
from tiny_models import TOKENS, VARIANTS

import convert
import fireq_jax
import pallas_kernels as pk
from fireq_jax.qtensor import is_int4

# Outputs of every weight but the head are multiples of 64, and groups of 32 or 64 divide the inputs.
SIZES = VARIANTS["biases"] | {"intermediate_size": 192, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return convert.load(write_checkpoint(tmp_path_factory.mktemp("in"), SIZES))


def int4_leaves(params):
    return [x for x in jax.tree.leaves(params, is_leaf=is_int4) if is_int4(x)]


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize(
    "recipe", ["rtn", "rtn_bf16", "rtn_folded", "data_free", fireq_jax.Recipe(group_size=32)], ids=str
)
def test_tiles_go_back_to_the_same_rows(model, recipe):
    rows = fireq_jax.quantize(model[1], recipe, layout="rows")
    tiles = fireq_jax.to_layout(rows, "tiles")
    assert {type(x) for x in int4_leaves(tiles)} == {fireq_jax.TiledInt4Weight}
    assert_same(fireq_jax.to_layout(tiles, "rows"), rows)
    assert_same(fireq_jax.to_layout(tiles, "tiles"), tiles)
    assert_same(fireq_jax.quantize(model[1], recipe, layout="tiles"), tiles)
    for ours, theirs in zip(int4_leaves(tiles), int4_leaves(rows), strict=True):
        assert (ours.shape, ours.group_size, ours.numerics) == (theirs.shape, theirs.group_size, theirs.numerics)
        np.testing.assert_array_equal(ours.dequantize(), theirs.dequantize())


@pytest.mark.parametrize("activations", ["fp8", "none"])
def test_only_weights_that_the_kernel_takes_are_tiled(model, activations):
    recipe = fireq_jax.Recipe(activations=activations, lm_head="int4")
    tiles = fireq_jax.quantize(model[1], recipe, layout="tiles")
    tiled = {type(x) for x in int4_leaves(tiles["layers_0"])}
    assert tiled == {fireq_jax.TiledInt4Weight if activations == "fp8" else fireq_jax.Int4Weight}
    assert isinstance(tiles["lm_head"]["kernel"], fireq_jax.Int4Weight)  # 131 outputs


def test_auto_suits_the_device(model):
    chosen = {type(x) for x in int4_leaves(fireq_jax.quantize(model[1], "rtn", layout="auto"))}
    assert chosen == {fireq_jax.TiledInt4Weight if pk.has_hopper_gpu() else fireq_jax.Int4Weight}
    with pytest.raises(ValueError, match="layout='columns' must be 'rows', 'tiles' or 'auto'"):
        fireq_jax.quantize(model[1], "rtn", layout="columns")


@pytest.mark.parametrize("recipe", ["data_free", "rtn_folded"])
def test_the_layout_does_not_change_the_model(model, recipe):
    network, params = model
    network = network.clone(implementation="reference")
    rows = fireq_jax.quantize(params, recipe, layout="rows")
    tiles = fireq_jax.to_layout(rows, "tiles")
    logits = [jax.jit(network.apply)({"params": p}, TOKENS) for p in (rows, tiles)]
    np.testing.assert_array_equal(*logits)
    texts = [fireq_jax.generate(network, p, TOKENS[0].tolist(), max_new_tokens=5).to_lists() for p in (rows, tiles)]
    assert texts[0] == texts[1]


def test_checkpoints_do_not_depend_on_the_layout(tmp_path, model):
    network, params = model
    rows = fireq_jax.quantize(params, layout="rows")
    tiles = fireq_jax.to_layout(rows, "tiles")
    convert.save(tmp_path / "out", network, tiles)
    assert_same(convert.load(tmp_path / "out", layout="rows")[1], rows)
    assert_same(convert.load(tmp_path / "out", layout="tiles")[1], tiles)
    convert.export_compressed_tensors(tmp_path / "packed", network, tiles, activations="none")
    exported = convert.load(tmp_path / "packed", layout="rows")[1]["layers_1"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(exported.dequantize(), rows["layers_1"]["mlp"]["up"]["kernel"].dequantize())

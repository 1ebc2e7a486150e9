"""Every transform is exact: the float model's logits stay as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import write_checkpoint
from tiny_models import TOKENS, VARIANTS

import convert
from fireq_jax import scaling

SHAPES = {
    "scale_attention_input": lambda c: (c.hidden_size,),
    "scale_mlp_input": lambda c: (c.hidden_size,),
    "scale_values": lambda c: (c.num_kv_heads, c.head_dim),
    "scale_mlp_hidden": lambda c: (c.intermediate_size,),
    "scale_keys_before_rope": lambda c: (c.num_kv_heads, c.head_dim // 2),
    "scale_keys_after_rope": lambda c: (c.num_kv_heads, c.head_dim),
    "rotate_keys_after_rope": lambda c: (c.num_kv_heads, c.head_dim),
}


def transformed(params, transform, shape, seed=0):
    rng = np.random.default_rng(seed)
    result = dict(params)
    for name in params:
        if name.startswith("layers_"):
            # a factor of 30 either way, both signs
            s = np.exp(rng.uniform(-3.4, 3.4, shape)) * rng.choice([-1, 1], shape)
            result[name] = transform(params[name], jnp.asarray(s, jnp.float32))
    return result


@pytest.mark.parametrize("variant", ["llama2", "llama31", "smollm2", "biases"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_stay_and_weights_do_not(name, variant, tmp_path):
    model, params = convert.load(write_checkpoint(tmp_path, VARIANTS[variant]))
    before = jax.tree.map(np.asarray, params)
    changed = transformed(params, getattr(scaling, name), SHAPES[name](model.config))
    jax.tree.map(np.testing.assert_array_equal, params, before)
    expected = model.apply({"params": params}, TOKENS)
    # float32 rounding of factors and their inverses, through two layers
    np.testing.assert_allclose(model.apply({"params": changed}, TOKENS), expected, rtol=0, atol=1e-4)
    same = jax.tree.structure(changed) == jax.tree.structure(params) and jax.tree.all(
        jax.tree.map(lambda a, b: bool((a == b).all()), changed, params)
    )
    assert not same


@pytest.mark.parametrize("variant", ["llama2", "llama31", "smollm2", "biases"])
def test_mixed_values_keep_the_logits(variant, tmp_path):
    model, params = convert.load(write_checkpoint(tmp_path, VARIANTS[variant]))
    changed = {key: scaling.rotate_values(x) if key.startswith("layers_") else x for key, x in params.items()}
    expected = model.apply({"params": params}, TOKENS)
    np.testing.assert_allclose(model.apply({"params": changed}, TOKENS), expected, rtol=0, atol=1e-4)
    v = "attention", "v", "kernel"
    assert not np.allclose(changed["layers_0"][v[0]][v[1]][v[2]], params["layers_0"][v[0]][v[1]][v[2]])


@pytest.mark.parametrize(("d", "block"), [(64, 64), (128, 128), (96, 32), (80, 16), (6, 2)])
def test_hadamard_matrices_are_orthonormal_and_spread_evenly(d, block):
    matrix = scaling.hadamard(d)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(d), atol=1e-6)
    np.testing.assert_allclose(np.abs(matrix[:block, :block]), block**-0.5, rtol=1e-6)


@pytest.mark.smollm2
def test_all_together_on_smollm2(smollm2):
    model, params = smollm2
    tokens = np.array([[1, 4093, 198, 2683, 359, 253, 5356, 5646, 11173, 3365]])
    expected = np.asarray(model.apply({"params": params}, tokens))
    changed = params
    for seed, (name, shape) in enumerate(SHAPES.items()):
        if name == "rotate_keys_after_rope":
            continue  # an offset beside scales of 30 leaves few float32 digits of a score's differences
        changed = transformed(changed, getattr(scaling, name), shape(model.config), seed)
    changed = {key: scaling.rotate_values(x) if key.startswith("layers_") else x for key, x in changed.items()}
    np.testing.assert_allclose(
        model.apply({"params": changed}, tokens), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )

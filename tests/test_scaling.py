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


@pytest.mark.smollm2
def test_all_together_on_smollm2(smollm2):
    model, params = smollm2
    tokens = np.array([[1, 4093, 198, 2683, 359, 253, 5356, 5646, 11173, 3365]])
    expected = np.asarray(model.apply({"params": params}, tokens))
    changed = params
    for seed, (name, shape) in enumerate(SHAPES.items()):
        changed = transformed(changed, getattr(scaling, name), shape(model.config), seed)
    np.testing.assert_allclose(
        model.apply({"params": changed}, tokens), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )

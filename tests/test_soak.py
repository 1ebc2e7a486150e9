"""A long generation keeps to the memory it began with."""

import jax

import fireq_jax
from fireq_jax.benchmark import SIZES
from fireq_jax.timed_calls import random_params

STEPS, SETTLED = 1000, 10


def memory_in_use():
    """Bytes of all arrays, and what the device's allocator has handed out where it says so."""
    jax.block_until_ready(jax.live_arrays())
    stats = jax.devices()[0].memory_stats() or {}
    return sum(array.nbytes for array in jax.live_arrays()), stats.get("bytes_in_use", 0)


def test_a_thousand_steps_take_no_more_memory_than_ten():
    model = fireq_jax.Llama(SIZES["toy"])
    params = fireq_jax.quantize(random_params(model.config), "rtn")
    options = {"max_new_tokens": STEPS, "eos_token_ids": ()}
    seen, tokens = [], []
    for step, token in enumerate(fireq_jax.generate_stream(model, params, [[1, 2, 3], [4]], **options)):
        tokens.append(token.tolist())  # an array would keep the device's memory
        if step in (SETTLED, STEPS - 1):
            seen.append(memory_in_use())
    assert len(tokens) == STEPS
    assert {len(token) for token in tokens} == {2}
    (arrays_before, device_before), (arrays_after, device_after) = seen
    assert arrays_after <= arrays_before
    assert device_after <= device_before

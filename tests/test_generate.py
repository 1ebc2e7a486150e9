import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import chisquare

import fireq_jax
from fireq_jax.generate import compiled_generate, padded_length
from fireq_jax.sampling import filter_logits, sample

PROMPTS = [[5, 17, 100], [9, 8, 7, 6, 5, 4, 3], [64]]


def greedy_oracle(model, params, prompt, steps):
    """Argmax over the whole sequence again and again, without any cache."""
    sequence = list(prompt)
    for _ in range(steps):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(sequence)] = sequence
        logits = model.apply({"params": params}, padded)
        sequence.append(int(jnp.argmax(logits[0, len(sequence) - 1])))
    return sequence[len(prompt) :]


def test_greedy_generation_repeats_the_argmax_of_the_whole_sequence(tiny):
    model, params = tiny
    out = fireq_jax.generate(model, params, PROMPTS, max_new_tokens=8, eos_token_ids=())
    assert out.to_lists() == [greedy_oracle(model, params, prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("quantized", [False, True])
def test_a_prompt_alone_and_in_a_batch(tiny, quantized):
    model, params = tiny
    params = fireq_jax.quantize(params) if quantized else params
    together = fireq_jax.generate(model, params, PROMPTS, max_new_tokens=12, eos_token_ids=()).to_lists()
    for prompt, expected in zip(PROMPTS, together, strict=True):
        alone = fireq_jax.generate(model, params, prompt, max_new_tokens=12, eos_token_ids=())
        assert alone.to_lists() == [expected]


@pytest.mark.smollm2
def test_smollm2_quantised_alone_and_in_a_batch(smollm2, smollm2_quantized, smollm2_tokenizer):
    model, _ = smollm2
    texts = ["The capital of France is", "In 1969 the first", "def fibonacci(n):\n    return"]
    prompts = [smollm2_tokenizer(text)["input_ids"] for text in texts]
    assert len({len(p) for p in prompts}) > 1
    together = fireq_jax.generate(model, smollm2_quantized, prompts, max_new_tokens=12).to_lists()
    for prompt, expected in zip(prompts, together, strict=True):
        assert fireq_jax.generate(model, smollm2_quantized, prompt, max_new_tokens=12).to_lists() == [expected]


def test_sequences_end_at_their_own_eos(tiny):
    model, params = tiny
    free = fireq_jax.generate(model, params, PROMPTS, max_new_tokens=8, eos_token_ids=()).to_lists()
    ends = (free[0][2], free[1][5])
    out = fireq_jax.generate(model, params, PROMPTS, max_new_tokens=8, eos_token_ids=ends)

    def cut(tokens):
        stops = [i for i, token in enumerate(tokens) if token in ends]
        return tokens[: stops[0] + 1] if stops else tokens

    assert out.to_lists() == [cut(tokens) for tokens in free]
    for row, n in zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True):
        assert (row[n:] == row[n - 1]).all()


def test_generation_stops_when_all_have_ended(tiny):
    model, params = tiny
    first = fireq_jax.generate(model, params, PROMPTS[0], max_new_tokens=1, eos_token_ids=()).to_lists()[0][0]
    out = fireq_jax.generate(model, params, PROMPTS[0], max_new_tokens=8, eos_token_ids=(first,))
    assert out.lengths.tolist() == [1]
    assert (np.asarray(out.tokens) == first).all()


@pytest.mark.parametrize("sampling", [fireq_jax.Sampling(), fireq_jax.Sampling(0.9, top_k=20, top_p=0.9)])
def test_streaming_gives_the_same_tokens(tiny, sampling):
    model, params = tiny
    params = fireq_jax.quantize(params)
    settings = {"max_new_tokens": 9, "sampling": sampling, "key": jax.random.key(3)}
    whole = fireq_jax.generate(model, params, PROMPTS, **settings)
    steps = np.stack(list(fireq_jax.generate_stream(model, params, PROMPTS, **settings)), axis=1)
    np.testing.assert_array_equal(steps, whole.tokens[:, : steps.shape[1]])
    assert steps.shape[1] == whole.lengths.max()


def test_same_key_same_tokens_other_key_other_tokens(tiny):
    model, params = tiny
    settings = {"max_new_tokens": 12, "sampling": fireq_jax.Sampling(1.0), "eos_token_ids": ()}
    runs = [fireq_jax.generate(model, params, PROMPTS, key=jax.random.key(k), **settings) for k in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0].tokens, runs[1].tokens)
    assert (np.asarray(runs[0].tokens) != np.asarray(runs[2].tokens)).any()


def test_under_an_outer_jit(tiny):
    model, params = tiny
    padded = np.zeros((3, 8), np.int32)
    for row, prompt in zip(padded, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([len(p) for p in PROMPTS], np.int32)
    jitted = jax.jit(lambda p, t, n: fireq_jax.generate(model, p, t, max_new_tokens=6, prompt_lengths=n).tokens)
    expected = fireq_jax.generate(model, params, padded, max_new_tokens=6, prompt_lengths=lengths)
    np.testing.assert_array_equal(jitted(params, padded, lengths), expected.tokens)
    assert expected.to_lists() == fireq_jax.generate(model, params, PROMPTS, max_new_tokens=6).to_lists()


def test_prompts_of_the_same_padded_shape_compile_once(tiny):
    model, params = tiny
    fireq_jax.generate(model, params, [1, 2, 3], max_new_tokens=5)
    compiled = compiled_generate._cache_size()
    fireq_jax.generate(model, params, list(range(40)), max_new_tokens=5)
    fireq_jax.generate(model, params, np.arange(3, 20), max_new_tokens=5)
    assert compiled_generate._cache_size() == compiled


def test_padded_lengths():
    lengths = [padded_length(n, 10**9) for n in range(1, 1500)]
    assert sorted(set(lengths)) == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536]
    assert all(n <= size <= max(64, 1.5 * n) for n, size in enumerate(lengths, 1))
    assert padded_length(70, 80) == 80


def test_the_int4_cache_takes_four_bits_per_element(tiny):
    config = tiny[0].config
    batch, capacity = 3, 40
    compiled = jax.jit(lambda: fireq_jax.KVCache.zeros(config, batch, capacity).layers).lower().compile()
    rows = config.num_layers * batch * capacity * config.num_kv_heads * 2  # keys and values
    # output_size counts a pointer per output in the tuple that holds them
    pointers = 8 * 4 * config.num_layers
    expected = rows * config.head_dim // 2 + rows * 2  # codes, and a bf16 scale each
    assert compiled.memory_analysis().output_size_in_bytes == expected + pointers
    assert fireq_jax.cache_bytes_per_token(config, "int4") * batch * capacity == expected


def test_generation_holds_the_cache_once_and_in_four_bits(tiny):
    """Peak temporary memory of the compiled loop grows with capacity by the INT4 cache's bytes, not by a float's."""
    model, params = tiny
    params = fireq_jax.quantize(params)
    tokens, lengths, key = jnp.zeros((4, 8), jnp.int32), jnp.full(4, 8, jnp.int32), jax.random.key(0)
    model = fireq_jax.Llama(
        fireq_jax.LlamaConfig(**{**vars(model.config), "max_positions": 1 << 16}), dtype=jnp.float32
    )

    def loop_state_bytes(capacity):
        lowered = compiled_generate.lower(model, params, tokens, lengths, key, 4, fireq_jax.Sampling(), (), capacity)
        text = lowered.compile().as_text()
        loops = [line for line in text.splitlines() if " while(" in line and f"u8[4,2,{capacity},8]" in line]
        assert len(loops) == 1, "one loop carries the cache"
        carried = loops[0].split(" while(")[0]
        assert f"f32[4,2,{capacity}" not in carried
        return carried.count(f"u8[4,2,{capacity},8]")

    assert loop_state_bytes(4096) == 2 * model.config.num_layers


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "there are no prompts"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([1, 131], {}, "prompt 0 holds token id 131, outside the vocabulary of 131"),
        ([1, -1], {}, "holds token id -1"),
        ([1] * 60, {}, r"has 60 tokens, max_new_tokens=5 more make 65: beyond the model's 64 positions"),
        ([1] * 10, {"cache_capacity": 12}, r"10 tokens, max_new_tokens=5 more make 15: beyond cache_capacity=12"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ([1], {"sampling": fireq_jax.Sampling(1.0)}, r"needs key=jax.random.key"),
        ([[1, 2]], {"prompt_lengths": np.array([2])}, "goes with an array of prompts"),
        (np.array([[1, 2]]), {"prompt_lengths": np.array([3])}, r"prompt_lengths=\[3\] does not describe"),
        (np.array([[0.5]]), {}, "must be .batch, t. integers"),
    ],
)
def test_bad_calls_are_refused(tiny, prompts, settings, message):
    model, params = tiny
    for function in (fireq_jax.generate, fireq_jax.generate_stream):
        with pytest.raises(ValueError, match=message):
            function(model, params, prompts, **({"max_new_tokens": 5} | settings))


def test_bad_sampling_and_caches_are_refused(tiny):
    for bad, message in (
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p"),
    ):
        with pytest.raises(ValueError, match=message):
            fireq_jax.Sampling(**bad)
    with pytest.raises(ValueError, match="capacity=65 must be between 1 and the model's 64 positions"):
        fireq_jax.KVCache.zeros(tiny[0].config, 1, 65)
    with pytest.raises(ValueError, match="kind='int8'"):
        fireq_jax.KVCache.zeros(tiny[0].config, 1, 8, "int8")


def test_filters_keep_what_their_definitions_say():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.15, 0.1, 0.05]]))

    def kept(**settings):
        return np.flatnonzero(np.isfinite(filter_logits(logits, fireq_jax.Sampling(1.0, **settings))[0])).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_k=9) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.3) == [0]
    assert kept(top_p=0.6) == [0, 1]
    assert kept(top_p=0.71) == [0, 1, 2]
    assert kept(top_p=0.89) == [0, 1, 2, 3]
    assert kept(top_k=4, top_p=0.89) == [0, 1, 2]  # the probabilities of the four that are left sum to one again


@given(
    hnp.arrays(
        np.float32, (3, 37), elements=st.sampled_from([-np.inf, -80, -2.5, -1, -0.0, 0, 0.25, 1, 1.0000002384185791, 6])
    ),
    st.integers(1, 37),
    st.floats(0.01, 0.999),
)
@settings(deadline=None)
def test_filters_against_sorting(logits, k, p):
    """Ties, zeros of both signs, tokens that are out already."""
    logits[:, 0] = 1  # not all are out
    kept = np.isfinite(filter_logits(jnp.asarray(logits), fireq_jax.Sampling(1.0, top_k=k)))
    possible = np.isfinite(logits)
    np.testing.assert_array_equal(kept, possible & (logits >= -np.sort(-logits)[:, k - 1 : k]))
    kept = np.isfinite(filter_logits(jnp.asarray(logits), fireq_jax.Sampling(1.0, top_p=p)))
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(-1, keepdims=True)
    for row, of_row, all_of_row in zip(kept, probabilities, logits, strict=True):
        above = np.array([of_row[all_of_row > x].sum() for x in all_of_row])
        # Float32 sums that come within rounding of p may fall to either side.
        clear = np.abs(above - p) > 1e-5
        np.testing.assert_array_equal(row[clear], ((above < p) & np.isfinite(all_of_row))[clear])


def test_draws_follow_the_distribution():
    probabilities = np.array([0.5, 0.25, 0.125, 0.125])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities) ** 0.5), (4000, 4))
    drawn = np.asarray(sample(logits, jax.random.key(0), fireq_jax.Sampling(temperature=0.5)))
    counts = np.bincount(drawn, minlength=4)
    # one false alarm in a million for a fixed key is none
    assert chisquare(counts, probabilities * counts.sum()).pvalue > 1e-6


@pytest.mark.parametrize(("capacity", "slots"), [(1, 8), (8, 8), (65, 72)])
def test_the_int4_cache_has_a_multiple_of_eight_slots(capacity, slots):
    """The Hopper kernel for decoding takes no others, also where a model's positions are no such number."""
    config = fireq_jax.LlamaConfig(16, 32, 64, 1, 2, 1, 16, 65)
    cache = fireq_jax.KVCache.zeros(config, 3, capacity)
    assert cache.capacity == slots
    assert {x.shape[:3] for x in jax.tree.leaves(cache.layers)} == {(3, 1, slots)}
    assert fireq_jax.KVCache.zeros(config, 3, capacity, "float").capacity == capacity

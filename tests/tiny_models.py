"""Random tiny Llamas in every shape and spelling that checkpoints come in.

Only numpy is needed, so that the script which makes the golden logits (it runs with torch, elsewhere) and the tests
build the same weights.
"""

from typing import Any

import numpy as np

TOKENS = np.array([[5, 17, 100, 3, 64, 9, 9, 120, 33, 77, 2], [1, 2, 3, 130, 129, 128, 40, 41, 42, 43, 7]])

_BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

VARIANTS: dict[str, dict[str, Any]] = {
    # multi-head attention, no num_key_value_heads, rope_theta on its own
    "llama2": {k: v for k, v in _BASE.items() if k != "num_key_value_heads"} | {"rope_theta": 10000.0},
    "llama3": _BASE | {"rope_theta": 500000.0, "rms_norm_eps": 1e-6},
    # rope settings as transformers 4 wrote them
    "llama31": _BASE | {"rope_theta": 500000.0, "rope_scaling": _LLAMA3_SCALING},
    # and as transformers 5 does
    "llama32_tied": _BASE
    | {"tie_word_embeddings": True, "rope_parameters": _LLAMA3_SCALING | {"rope_theta": 500000.0}},
    # the oldest spelling
    "linear_rope": _BASE | {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    # three query heads on one kv head, tied
    "smollm2": _BASE
    | {
        "hidden_size": 96,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_theta": 100000.0,
    },
    # a head size that does not follow from the hidden size
    "mistral": _BASE
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "head_dim": 32,
        "sliding_window": None,
        "rope_theta": 1000000.0,
    },
    "biases": _BASE | {"attention_bias": True, "mlp_bias": True, "rope_theta": 10000.0},
}


def state_dict(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 weights under Hugging Face names."""
    rng = np.random.default_rng(seed)
    hidden, wide, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    d = config.get("head_dim", hidden // heads)
    queries, keys = heads * d, config.get("num_key_value_heads", heads) * d

    def normal(*shape: int) -> np.ndarray:
        return (0.15 * rng.standard_normal(shape)).astype(np.float32)

    weights = {"model.embed_tokens.weight": 5 * normal(config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        shapes = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        for name, shape in shapes.items():
            weights[f"{prefix}{name}.weight"] = normal(*shape)
            if config.get("attention_bias" if name.startswith("self_attn") else "mlp_bias"):
                weights[f"{prefix}{name}.bias"] = normal(shape[0])
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{name}.weight"] = 1 + normal(hidden)
    weights["model.norm.weight"] = 1 + normal(hidden)
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = normal(config["vocab_size"], hidden)
    return weights

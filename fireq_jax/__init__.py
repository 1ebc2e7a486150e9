"""INT4 weights and INT4 KV cache with FP8 activations for Llama models in JAX, after FireQ (arXiv 2505.20839)."""

from fireq_jax.calibrate import calibrate, load_calibration, save_calibration
from fireq_jax.config import PRESETS, LlamaConfig, Recipe, RopeConfig
from fireq_jax.evaluate import Evaluation, evaluate
from fireq_jax.generate import Generation, generate, generate_stream
from fireq_jax.kv_cache import KVCache, cache_bytes_per_token
from fireq_jax.llama import Llama
from fireq_jax.qtensor import ByteWeight, Int4Weight, TiledInt4Weight, to_layout
from fireq_jax.quantize import parameter_bytes, quantize, recipe_of
from fireq_jax.sampling import Sampling

__all__ = [
    "PRESETS",
    "ByteWeight",
    "Evaluation",
    "Generation",
    "Int4Weight",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "Recipe",
    "RopeConfig",
    "Sampling",
    "TiledInt4Weight",
    "cache_bytes_per_token",
    "calibrate",
    "evaluate",
    "generate",
    "generate_stream",
    "load_calibration",
    "parameter_bytes",
    "quantize",
    "recipe_of",
    "save_calibration",
    "to_layout",
]

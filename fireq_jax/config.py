"""What a Llama looks like (:class:`LlamaConfig`) and how it is quantised (:class:`Recipe`)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import numpy as np

SUPPORTED_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: angle of position p and pair i is ``p · inverse_frequencies[i]``.

    Attributes:
      theta: base of the geometric progression of frequencies.
      kind: "default"; "linear" (positions divided by ``factor``); "llama3" (low frequencies divided by ``factor``,
        a smooth ramp between); "factors" (frequency i divided by ``factors[i]``, as GGUF files store llama3).
      factor: of "linear" and "llama3".
      low_freq_factor: of "llama3": wavelengths above ``original_max_positions / low_freq_factor`` are stretched.
      high_freq_factor: of "llama3": wavelengths below ``original_max_positions / high_freq_factor`` are kept.
      original_max_positions: of "llama3".
      factors: of "factors": head_dim / 2 divisors.
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "factors"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        divisors = {"theta": self.theta, "factor": self.factor, "original_max_positions": self.original_max_positions}
        for name, value in divisors.items():
            if not value > 0:
                raise ValueError(f"rope: {name}={value!r} must be positive")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"rope: {self.low_freq_factor=} must be positive and below {self.high_freq_factor=}")
        if not all(factor > 0 for factor in self.factors):
            raise ValueError("rope: every frequency's factor must be positive")

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """``[head_dim / 2]`` float32, radians per position."""
        base = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            base = base / self.factor
        elif self.kind == "factors":
            base = base / np.asarray(self.factors, np.float64)
        elif self.kind == "llama3":
            turns = self.original_max_positions * base / (2 * math.pi)
            keep = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
            base = base * (keep + (1.0 - keep) / self.factor)
        return base.astype(np.float32)


# Without arrays, too, it travels inside the statistics of a calibration.
@jax.tree_util.register_static
@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and settings of a Llama-family decoder; hashable, so that it can be static under ``jax.jit``.

    Attributes:
      vocab_size: rows of the embedding.
      hidden_size: width of the residual stream.
      intermediate_size: width of the MLP.
      num_layers: decoder blocks.
      num_heads: query heads.
      num_kv_heads: key/value heads; divides ``num_heads``.
      head_dim: size of a head, even.
      max_positions: longest sequence the model was made for. With a sliding window shorter than that, the window:
        up to there full attention is the same thing.
      rms_norm_eps: epsilon of the RMS norms.
      rope: rotary position embedding.
      tie_word_embeddings: the embedding is the output projection, too.
      attention_bias: q, k, v and o have biases.
      mlp_bias: gate, up and down have biases.
      bos_token_id: first token of a text, if there is one.
      eos_token_ids: tokens that end a generation.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
                 "head_dim", "max_positions")  # fmt: skip
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads=} must be divisible by {self.num_kv_heads=}")
        if self.head_dim % 2:
            raise ValueError(f"{self.head_dim=} must be even: RoPE rotates pairs of channels")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"{self.rms_norm_eps=} must be positive")
        if self.rope.kind == "factors" and len(self.rope.factors) != self.head_dim // 2:
            raise ValueError(f"rope needs {self.head_dim // 2} factors, got {len(self.rope.factors)}")

    def check_tokens(self, ids: np.ndarray) -> None:
        """Raises ValueError if a token id is outside the vocabulary."""
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise ValueError(f"token ids {ids.min()} to {ids.max()} leave the vocabulary of {self.vocab_size}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Reads a Hugging Face ``config.json``, in the spelling of transformers 5 or of earlier versions.

        Raises:
          ValueError: not a Llama, a required key is missing, or a setting this library does not compute (another
            activation, another rope scaling, an existing quantisation) is on; the message names it.
        """
        architectures = config.get("architectures") or []
        if not architectures and config.get("model_type") in ("llama", "mistral"):
            architectures = [f"{config['model_type'].capitalize()}ForCausalLM"]
        if not isinstance(architectures, list) or not architectures or architectures[0] not in SUPPORTED_ARCHITECTURES:
            raise ValueError(f"{architectures=} is not a Llama; supported: {', '.join(SUPPORTED_ARCHITECTURES)}")
        _refuse_unsupported(config)
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in required if config.get(key) is None]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        vocab, hidden, intermediate, layers, heads = (_integer(config, key, 1) for key in required)
        max_positions = _integer(config, "max_position_embeddings", 2048)
        eos = config.get("eos_token_id")
        eos_ids = eos if isinstance(eos, list | tuple) else [] if eos is None else [eos]
        return cls(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=_integer(config, "num_key_value_heads", heads),
            head_dim=_integer(config, "head_dim", hidden // heads),
            max_positions=min(max_positions, _integer(config, "sliding_window", max_positions)),
            rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope=_rope_from_hf(config, max_positions),
            tie_word_embeddings=_flag(config, "tie_word_embeddings"),
            attention_bias=_flag(config, "attention_bias"),
            mlp_bias=_flag(config, "mlp_bias"),
            bos_token_id=None if config.get("bos_token_id") is None else _integer(config, "bos_token_id", 0, least=0),
            eos_token_ids=tuple(_integer({"eos_token_id": token}, "eos_token_id", 0, least=0) for token in eos_ids),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``config.json`` of this model, readable by :meth:`from_hf` and by transformers."""
        rope: dict[str, Any] = {"rope_type": self.rope.kind, "rope_theta": self.rope.theta}
        if self.rope.kind in ("linear", "llama3"):
            rope["factor"] = self.rope.factor
        if self.rope.kind == "llama3":
            rope |= {
                "low_freq_factor": self.rope.low_freq_factor,
                "high_freq_factor": self.rope.high_freq_factor,
                "original_max_position_embeddings": self.rope.original_max_positions,
            }
        if self.rope.kind == "factors":
            rope["factors"] = list(self.rope.factors)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_parameters": rope,
            # transformers before 5 reads these two instead
            "rope_theta": self.rope.theta,
            "rope_scaling": None if self.rope.kind == "default" else rope,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": self.attention_bias,
            "mlp_bias": self.mlp_bias,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids) or None,
        }


def _integer(config: Mapping[str, Any], key: str, default: int, least: int = 1) -> int:
    """A whole number of a ``config.json``; ``default`` if it is missing or null."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"config.json: {key}={value!r} must be an integer, {least} or more")
    return value


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A number of a ``config.json``; ``default`` if it is missing or null."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e300:
        raise ValueError(f"config.json: {key}={value!r} must be a finite number")
    return float(value)


def _flag(config: Mapping[str, Any], key: str) -> bool:
    """A truth value of a ``config.json``; False if it is missing or null."""
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {key}={value!r} must be true or false")
    return bool(value)


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    if (activation := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise ValueError(f"hidden_act={activation!r} is not supported; a Llama uses 'silu'")
    if (rotated := config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"partial_rotary_factor={rotated} is not supported; every channel must be rotated")
    if (quantization := config.get("quantization_config")) is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else quantization
        raise ValueError(
            f"the checkpoint is already quantised (quantization_config.quant_method={method!r}); "
            "load the original bf16/f16/f32 weights"
        )


def _rope_from_hf(config: Mapping[str, Any], max_positions: int) -> RopeConfig:
    # transformers 5 keeps everything in rope_parameters; before, rope_theta stood alone beside rope_scaling, whose
    # kind was once called "type".
    settings: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = config.get(key) or {}
        if not isinstance(part, Mapping):
            raise ValueError(f"config.json: {key}={part!r} must be an object")
        settings |= part
    kind = settings.get("rope_type") or settings.get("type") or "default"
    theta = _number(settings, "rope_theta", _number(config, "rope_theta", 10000.0))
    needed = {
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
        "factors": ("factors",),
    }
    if kind == "default":
        return RopeConfig(theta=theta)
    if not isinstance(kind, str) or kind not in needed:
        raise ValueError(f"rope scaling {kind!r} is not supported; supported: default, linear, llama3")
    for key in needed[kind]:
        if settings.get(key) is None:
            raise ValueError(f"rope scaling {kind!r} lacks {key!r}; got {settings}")
    if kind == "factors":
        factors = settings["factors"]
        if not isinstance(factors, list | tuple):
            raise ValueError(f"rope scaling 'factors' has factors={factors!r}, which must be a list")
        return RopeConfig(
            theta=theta, kind="factors", factors=tuple(_number({"factors": f}, "factors", 1) for f in factors)
        )
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=_number(settings, "factor", 1.0))
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=_number(settings, "factor", 1.0),
        low_freq_factor=_number(settings, "low_freq_factor", 1.0),
        high_freq_factor=_number(settings, "high_freq_factor", 4.0),
        original_max_positions=_integer(settings, "original_max_position_embeddings", max_positions),
    )


# A Recipe has no arrays, so it travels inside a parameter pytree as part of its structure.
@jax.tree_util.register_static
@dataclass(frozen=True)
class Recipe:
    """How a float model becomes an INT4/FP8 one. Named ones are in :data:`PRESETS`.

    Attributes:
      name: what the recipe is called in reports and checkpoints.
      group_size: neighbours along k that share a weight scale. A tuple is tried in order, per weight, until one
        divides k; a single number must divide every k.
      scales: "sigma_fp8" stores group scales as e4m3 with one float32 per weight (FireQ's per-tensor scale),
        "sigma_bf16" as bf16.
      tensor_scale: how sigma_fp8 picks the power of two p by which scales are multiplied before e4m3 rounding (the
        stored float32 is 1 / p). "largest": the largest that saturates none, so that as many as possible leave the
        subnormal range. "fireq": the published rule, the smallest of 1, 2, 4 ... 2^14 that underflows none.
        "none": p = 1.
      numerics: "exact" or "folded", see :func:`pallas_kernels.int4_fp8_matmul`.
      activations: "fp8" rounds the input of every quantised weight to e4m3 per token, "none" leaves it alone.
      kv_cache: "int4", or "float" for a cache in the model's dtype (queries then stay unrounded, too).
      weights: "int4", or "none" to leave linear weights and activations as they are and have an int4 cache alone.
      smoothing: channel-wise scaling of linear inputs. "none"; "mean" is FireQ's, from weights alone, and "absmax" the
        same with the largest magnitude instead of the mean one; "search" picks powers of input and weight magnitudes
        by output error (needs a calibration).
      keys: how keys are prepared for int4, against queries. "none"; "fireq" scales pairs before and the largest
        channels after RoPE; "search" scales every channel after RoPE by score error; "hadamard" scales every channel
        after RoPE, subtracts a constant that softmax does not see, and mixes channels (from weights alone if there is
        no calibration, which the other two need).
      key_top_k: channels per head that "fireq" scales after RoPE, besides their partners.
      values: "none", or "hadamard" to mix each head's value channels, folded into weights.
      rounding: "nearest"; "search" for group scales searched by output error (by weight error if there is no
        calibration); or "gptq" for such scales with error-compensated codes (needs a calibration).
      sequential: "gptq" sees the inputs that the already quantised layers produce, instead of the float model's, and
        makes up for part of their error. Takes another two passes over the calibration text.
      curvature: "gptq" weighs tokens by how much the model's predictions depend on them, and makes up for the error of
        some outputs of a weight by others (needs "sequential"; takes a backward pass through the whole float model).
      refine: tune norm gains and rotation scales by distillation from the float model behind everything else, three
        passes of training over the calibration text (needs a calibration).
      lm_head: how the output projection is kept. "float"; "int8" or "fp8" (e4m3) with a scale per output, its input
        unrounded, of which "int8" is nearer to the float weight; "int4" rounds it to the nearest codes, like any other
        weight. A tied embedding keeps its float copy for the input side.
    """

    name: str = "custom"
    group_size: int | tuple[int, ...] = (128, 64, 32)
    scales: Literal["sigma_fp8", "sigma_bf16"] = "sigma_fp8"
    tensor_scale: Literal["largest", "fireq", "none"] = "largest"
    numerics: Literal["exact", "folded"] = "exact"
    activations: Literal["fp8", "none"] = "fp8"
    kv_cache: Literal["int4", "float"] = "int4"
    weights: Literal["int4", "none"] = "int4"
    smoothing: Literal["none", "mean", "absmax", "search"] = "none"
    keys: Literal["none", "fireq", "search", "hadamard"] = "none"
    key_top_k: int = 3
    values: Literal["none", "hadamard"] = "none"
    rounding: Literal["nearest", "search", "gptq"] = "nearest"
    sequential: bool = False
    curvature: bool = False
    refine: bool = False
    lm_head: Literal["float", "int8", "fp8", "int4"] = "float"

    def __post_init__(self) -> None:
        choices = {
            "scales": ("sigma_fp8", "sigma_bf16"),
            "tensor_scale": ("largest", "fireq", "none"),
            "numerics": ("exact", "folded"),
            "activations": ("fp8", "none"),
            "kv_cache": ("int4", "float"),
            "weights": ("int4", "none"),
            "smoothing": ("none", "mean", "absmax", "search"),
            "keys": ("none", "fireq", "search", "hadamard"),
            "values": ("none", "hadamard"),
            "rounding": ("nearest", "search", "gptq"),
            "lm_head": ("float", "int8", "fp8", "int4"),
        }
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(allowed)}")
        if self.weights == "none" and (self.rounding, self.lm_head) != ("nearest", "float"):
            raise ValueError("weights='none' rounds no weight; it goes with rounding='nearest' and lm_head='float'")
        if self.sequential and self.rounding != "gptq":
            raise ValueError(f"sequential=True needs rounding='gptq', not {self.rounding!r}")
        if self.curvature and not self.sequential:
            raise ValueError("curvature=True needs sequential=True")
        for name in ("sequential", "curvature", "refine"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r} must be True or False")
        if not isinstance(self.name, str):
            raise ValueError(f"name={self.name!r} must be a string")
        if not isinstance(self.key_top_k, int) or self.key_top_k < 0:
            raise ValueError(f"key_top_k={self.key_top_k!r} must be a number of channels, 0 or more")
        sizes = (self.group_size,) if isinstance(self.group_size, int) else self.group_size
        if not isinstance(sizes, tuple) or not sizes or any(not isinstance(g, int) or g < 2 or g % 2 for g in sizes):
            raise ValueError(f"group_size={self.group_size!r} must be an even number, or a tuple of such")

    @property
    def needs_calibration(self) -> bool:
        """Whether the recipe reads statistics of activations."""
        return self.smoothing == "search" or self.keys in ("fireq", "search") or self.rounding == "gptq" or self.refine

    @property
    def differentiates(self) -> bool:
        """Whether it needs gradients, and with them the whole model at once."""
        return self.curvature or self.refine


_BEST = Recipe("best", smoothing="search", keys="hadamard", values="hadamard", rounding="gptq", sequential=True)
PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("rtn"),
        Recipe("rtn_bf16", scales="sigma_bf16"),
        Recipe("rtn_folded", numerics="folded"),
        Recipe("data_free", smoothing="mean", keys="hadamard", values="hadamard", rounding="search"),
        Recipe("fireq", tensor_scale="fireq", smoothing="mean", keys="fireq"),
        Recipe("fireq_bf16", scales="sigma_bf16", smoothing="mean", keys="fireq"),
        _BEST,
        replace(_BEST, name="learned", curvature=True, refine=True),
        Recipe("kv4", weights="none", keys="hadamard", values="hadamard"),
    )
}


def resolve_recipe(recipe: "Recipe | str") -> Recipe:
    """A :class:`Recipe` as it is, or the preset of that name.

    Raises:
      ValueError: there is no such preset.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if recipe not in PRESETS:
        raise ValueError(f"unknown preset {recipe!r}; known: {', '.join(PRESETS)}")
    return PRESETS[recipe]

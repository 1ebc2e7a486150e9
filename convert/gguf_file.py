"""GGUF files: sizes from the metadata, weights through the ``gguf`` package's dequantiser."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFReader, GGUFValueType, get_tensor_name_map
from gguf.quants import dequantize

from convert.gguf_header import check_header
from convert.tensors import Table, check_layers, check_tensors, tensor_table
from fireq_jax.config import LlamaConfig, RopeConfig


class GgufModel:
    """A GGUF file whose architecture is Llama.

    Attributes:
      path: the file.
      metadata: plain Python values by key.
      config: the model's sizes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            check_header(path)
            reader = GGUFReader(path)
        except Exception as error:  # the reader raises whatever numpy does on a damaged file
            raise ValueError(f"{path} is not a whole GGUF file ({error}); download or copy it again") from error
        self.metadata: dict[str, Any] = {key: _plain(field) for key, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.config = self._config()
        check_layers(self.config, len(self._tensors), str(path))
        self._mapping = get_tensor_name_map(MODEL_ARCH.LLAMA, self.config.num_layers)

    def table(self) -> Table:
        """What the file holds, under Hugging Face names.

        Raises:
          ValueError: tensors are missing, unexpected or of the wrong shape.
        """
        table = tensor_table(self.config)
        expected = {self._name(name): spec.stored_shape for name, spec in table.items()}
        found = {name: _shape(tensor) for name, tensor in self._tensors.items()}
        check_tensors(found, expected, ["rope_freqs.weight"], str(self.path))
        return table

    def read(self, name: str) -> np.ndarray:
        """The float32 value of the weight with this Hugging Face name."""
        tensor = self._tensors[self._name(name)]
        # Mapped anew: pages of the reader's own map would stay with the process.
        data = np.memmap(self.path, tensor.data.dtype, "r", int(tensor.data_offset), tensor.data.shape).view(np.ndarray)
        value = dequantize(data, tensor.tensor_type).astype(np.float32, copy=False).reshape(_shape(tensor))
        heads = {"self_attn.q_proj": self.config.num_heads, "self_attn.k_proj": self.config.num_kv_heads}
        module = ".".join(name.split(".")[3:5])
        return _unpermute(value, heads[module]) if module in heads else value

    def _name(self, name: str) -> str:
        """The GGUF name of the tensor with this Hugging Face name."""
        mapped = self._mapping.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise ValueError(f"the gguf package knows no name for {name}")
        return mapped

    def _config(self) -> LlamaConfig:
        arch = self.metadata.get("general.architecture")
        if arch != "llama":
            raise ValueError(f"{self.path}: general.architecture={arch!r} is not a Llama")

        def get(key: str, default: Any = None) -> Any:
            value = self.metadata.get(f"llama.{key}", default)
            if value is None:
                raise ValueError(f"{self.path} lacks llama.{key}")
            return value

        if "token_embd.weight" not in self._tensors:
            raise ValueError(f"{self.path} lacks token_embd.weight")
        heads = get("attention.head_count")
        head_dim = get("attention.key_length", get("embedding_length") // heads)
        if (rotated := get("rope.dimension_count", head_dim)) != head_dim:
            raise ValueError(f"{self.path}: rope.dimension_count={rotated} must be the head size {head_dim}")
        eos = [self.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
        return LlamaConfig(
            vocab_size=_shape(self._tensors["token_embd.weight"])[0],
            hidden_size=get("embedding_length"),
            intermediate_size=get("feed_forward_length"),
            num_layers=get("block_count"),
            num_heads=heads,
            num_kv_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_positions=get("context_length"),
            rms_norm_eps=float(get("attention.layer_norm_rms_epsilon")),
            rope=self._rope(get),
            tie_word_embeddings="output.weight" not in self._tensors,
            attention_bias="blk.0.attn_q.bias" in self._tensors,
            mlp_bias="blk.0.ffn_gate.bias" in self._tensors,
            bos_token_id=self.metadata.get("tokenizer.ggml.bos_token_id"),
            eos_token_ids=tuple(dict.fromkeys(token for token in eos if token is not None)),
        )

    def _rope(self, get: Callable[..., Any]) -> RopeConfig:
        theta = float(get("rope.freq_base", 10000.0))
        kind = get("rope.scaling.type", "none")
        if "rope_freqs.weight" in self._tensors:
            # llama3 scaling is stored as one divisor per frequency
            return RopeConfig(theta, "factors", factors=tuple(self._tensors["rope_freqs.weight"].data.tolist()))
        if kind == "none":
            return RopeConfig(theta)
        if kind == "linear":
            return RopeConfig(theta, "linear", factor=float(get("rope.scaling.factor")))
        raise ValueError(f"{self.path}: rope.scaling.type={kind!r} is not supported; supported: none, linear")


@lru_cache(maxsize=1)
def _open(path: Path, modified_ns: int) -> GgufModel:
    return GgufModel(path)


def open_gguf(path: Path) -> GgufModel:
    """Opens a file; the newest one stays open, since the metadata takes seconds to parse.

    Raises:
      ValueError: the file is damaged or no Llama.
    """
    return _open(path, path.stat().st_mtime_ns)


def _plain(field: Any) -> Any:
    value = field.contents()
    return value.decode() if isinstance(value, bytes) and field.types[0] == GGUFValueType.STRING else value


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in reversed(tensor.shape))  # GGUF lists the fastest axis first


def _unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's interleaving of each head's two rotary halves: its rows are 0, d/2, 1, d/2 + 1, ..."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)

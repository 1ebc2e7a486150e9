"""Checkpoints in and out: Hugging Face safetensors, GGUF, compressed-tensors, the hub, and this library's own."""

from convert.checkpoint import checkpoint_id, load, save
from convert.compressed import export_compressed_tensors
from convert.hub import push_to_hub, write_model_card
from convert.source import embedded_model
from convert.streaming import quantize_checkpoint
from convert.tokenizer import load_tokenizer

__all__ = [
    "checkpoint_id",
    "embedded_model",
    "export_compressed_tensors",
    "load",
    "load_tokenizer",
    "push_to_hub",
    "quantize_checkpoint",
    "save",
    "write_model_card",
]

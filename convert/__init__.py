"""Checkpoints in and out: Hugging Face safetensors, GGUF, hub repositories, and this library's own."""

from convert.checkpoint import load, save
from convert.compressed import export_compressed_tensors
from convert.source import embedded_model
from convert.streaming import quantize_checkpoint
from convert.tokenizer import load_tokenizer

__all__ = ["embedded_model", "export_compressed_tensors", "load", "load_tokenizer", "quantize_checkpoint", "save"]

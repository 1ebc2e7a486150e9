"""Tokenizers and chat templates, from the same source as the weights and without torch."""

import shutil
from pathlib import Path
from typing import Any

from convert.gguf_file import open_gguf
from convert.source import resolve

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_COMPANIONS = (
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# How GGUF's tokenizer.ggml.pre splits text before byte-pair merging.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


def load_tokenizer(source: str | Path, revision: str | None = None) -> Any:
    """The tokenizer of a model, a ``transformers`` fast tokenizer with its chat template.

    Args:
      source: as for :func:`convert.load`.
      revision: branch, tag or commit of a hub repository.

    Raises:
      FileNotFoundError: the folder has no tokenizer.
      ValueError: the GGUF file's tokenizer is of a kind this library cannot build.
    """
    path = resolve(source, revision)
    if path.suffix == ".gguf":
        return _from_gguf(path)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{path} has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); copy those files from the model "
            "the weights came from"
        )
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def copy_tokenizer(path: Path, folder: Path) -> None:
    """Puts the tokenizer of a model beside its weights: a folder's files as they are, or a GGUF file's, built.

    Args:
      path: a folder (it may have no tokenizer) or a ``.gguf`` file.
      folder: where to.
    """
    if path.suffix == ".gguf":
        load_tokenizer(path).save_pretrained(folder)
        return
    for name in (*_TOKENIZER_FILES, *_COMPANIONS):
        if (path / name).is_file():
            shutil.copyfile(path / name, folder / name)


def _from_gguf(path: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    metadata = open_gguf(path).metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"{path}: tokenizer.ggml.model={kind!r} is not supported; supported: gpt2, llama")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    backend = _byte_level(metadata, path) if kind == "gpt2" else _sentencepiece(metadata)
    _add_special_tokens(backend, metadata)
    _add_bos_eos(backend, metadata)
    special = {}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            special[f"{role}_token"] = tokens[token_id]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return tokenizer


def _byte_level(metadata: dict[str, Any], path: Path) -> Any:
    """Byte-level BPE, as GPT-2, Llama 3 and SmolLM2 use it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    split = metadata.get("tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splits: dict[str, Any] = {
        "default": byte_level,
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    splits["llama-bpe"] = splits["llama3"] = splits["llama-v3"] = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    if split not in splits:
        raise ValueError(f"{path}: tokenizer.ggml.pre={split!r} is not supported; supported: {', '.join(splits)}")
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    # Llama 3 looks a whole word up before it merges bytes.
    whole_words = split in ("llama-bpe", "llama3", "llama-v3")
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=whole_words))
    backend.pre_tokenizer = splits[split]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: dict[str, Any]) -> Any:
    """SentencePiece BPE, as Llama 2, Mistral and TinyLlama use it: merges follow from the pieces' scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    scores: list[float] = metadata["tokenizer.ggml.scores"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    candidates = []
    for whole, i in vocabulary.items():
        halves = [
            (vocabulary[whole[:cut]], vocabulary[whole[cut:]], whole[:cut], whole[cut:])
            for cut in range(1, len(whole))
            if whole[:cut] in vocabulary and whole[cut:] in vocabulary
        ]
        candidates += [(-scores[i], left_id, right_id, left, right) for left_id, right_id, left, right in halves]
    merges = [(left, right) for *_, left, right in sorted(candidates)]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _add_special_tokens(backend: Any, metadata: dict[str, Any]) -> None:
    from tokenizers import AddedToken

    kinds = metadata.get("tokenizer.ggml.token_type") or []
    for token, kind in zip(metadata["tokenizer.ggml.tokens"], kinds, strict=False):
        if kind == _CONTROL:
            backend.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(token, normalized=False)])


def _add_bos_eos(backend: Any, metadata: dict[str, Any]) -> None:
    """Lets the tokenizer put bos in front and eos behind where the file says so."""
    from tokenizers import processors

    tokens = metadata["tokenizer.ggml.tokens"]
    # SentencePiece files without the flag mean that bos is added.
    default_bos = metadata["tokenizer.ggml.model"] == "llama"
    front: list[tuple[str, int]] = []
    back: list[tuple[str, int]] = []
    for role, place, default in (("bos", front, default_bos), ("eos", back, False)):
        token_id = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if token_id is not None and metadata.get(f"tokenizer.ggml.add_{role}_token", default):
            place.append((tokens[token_id], token_id))
    if front or back:
        names = [token for token, _ in front], [token for token, _ in back]
        backend.post_processor = processors.TemplateProcessing(
            single=[*names[0], "$A", *names[1]],
            pair=[*names[0], "$A", *names[1], *names[0], "$B:1", *names[1]],
            special_tokens=front + back,
        )

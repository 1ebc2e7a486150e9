"""Checkpoints on the Hugging Face hub: a model card with measured numbers, and uploading."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert import native
from convert.checkpoint import read_config
from convert.folder import write_text
from convert.safetensors_file import TensorFile, open_all
from convert.source import LOADED_FILES, weight_files
from fireq_jax.config import LlamaConfig
from fireq_jax.kv_cache import cache_bytes_per_token

_CARD, _TEMPLATE = "README.md", Path(__file__).parent / "data" / "model_card.md"
# The card, and what a licence asks to be passed on, are not read.
_UPLOADED = [*LOADED_FILES, _CARD, "LICENSE*", "NOTICE*", "USE_POLICY*"]


def write_model_card(
    folder: str | Path,
    repo_id: str,
    *,
    evaluations: Mapping[str, Mapping[str, Any]] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    language: str | Sequence[str] | None = None,
) -> Path:
    """Writes the ``README.md`` of a checkpoint: what it is, how large, how it was made, and what was measured.

    Args:
      folder: a checkpoint of :func:`convert.save` or :func:`convert.quantize_checkpoint` with int4 weights or cache.
      repo_id: where it will be found, ``"org/name"``.
      evaluations: by name of the text, what ``fireq-jax evaluate --json`` wrote: the fields of
        :class:`fireq_jax.Evaluation` and ``checkpoint_id``.
      base_model: hub id of the float model.
      license: its licence, as the hub spells it, e.g. "apache-2.0" or "llama3.1".
      language: language codes.

    Returns:
      The file.

    Raises:
      FileNotFoundError: a file of the checkpoint is missing.
      ValueError: the folder is no whole checkpoint of this library, or an evaluation is one of another checkpoint.
    """
    from huggingface_hub import ModelCard, ModelCardData

    path = Path(folder).expanduser()
    hf_config, files = _open(path)
    block = hf_config["fireq"]
    for name, evaluation in (evaluations or {}).items():
        if (found := evaluation.get("checkpoint_id")) != block["checkpoint_id"]:
            raise ValueError(
                f"the evaluation on {name!r} is one of checkpoint {found}, {path} is {block['checkpoint_id']}; measure "
                f"it with: fireq-jax evaluate --model {path} --text FILE --json FILE"
            )
    recipe, config = block["recipe"], LlamaConfig.from_hf(hf_config)
    bits = {"int4": "INT4 weights", "none": "float weights"}
    caches = {"int4": "an INT4 KV cache", "float": "a float KV cache"}
    table = native.full_table(config, False, lambda spec: False)
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        language=list(language) if language is not None and not isinstance(language, str) else language,
        library_name="fireq-jax",
        license=license,
        pipeline_tag="text-generation",
        tags=["jax", "int4", "fp8", "quantized", "fireq"],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(_TEMPLATE),
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        base_model=base_model,
        weights=bits[recipe["weights"]],
        activations="FP8 activations" if recipe["activations"] == "fp8" else "float activations",
        cache=caches[recipe["kv_cache"]],
        library_version=block["library_version"],
        checkpoint_id=block["checkpoint_id"],
        recipe=recipe,
        groups=", ".join(f"{module}: {size}" for module, size in block["group_sizes"].items()) or "none",
        bytes=sum(file.path.stat().st_size for file in files),
        bf16_bytes=2 * sum(math.prod(spec.shape) for spec in table.values()),
        shards=len(files),
        cache_bytes=cache_bytes_per_token(config, recipe["kv_cache"]),
        evaluations=evaluations or {},
    )
    write_text(path / _CARD, str(card))
    return path / _CARD


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Uploads a checkpoint, after its files were checked, in one commit.

    Args:
      folder: a checkpoint of this library; its ``README.md``, if there is one, is the model card.
      repo_id: ``"org/name"``; made if it does not exist.
      private: of a repository that is made.
      revision: branch to commit to; made if it does not exist. None takes the main one.
      create_pr: open a pull request instead.
      commit_message: of the commit.
      token: of the hub; None takes the one that ``hf auth login`` stored, or ``HF_TOKEN``.

    Returns:
      The address of the commit.

    Raises:
      FileNotFoundError: a file of the checkpoint is missing.
      ValueError: the folder is no whole checkpoint of this library.
      huggingface_hub.errors.HfHubHTTPError: the hub refused.
    """
    from huggingface_hub import HfApi

    path = Path(folder).expanduser()
    hf_config, _ = _open(path)
    message = commit_message or f"fireq-jax checkpoint {hf_config['fireq']['checkpoint_id']}"
    api = HfApi(token=token, library_name="fireq-jax")
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=path,
        allow_patterns=_UPLOADED,
        # Shards of an older checkpoint would be loaded together with the new ones, or refused.
        delete_patterns=["*.safetensors", "*.safetensors.index.json"],
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
    )
    return str(commit.commit_url)


def _open(path: Path) -> tuple[dict[str, Any], list[TensorFile]]:
    """Config and shards of a whole checkpoint of this library."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not a folder")
    hf_config = read_config(path)
    if "fireq" not in hf_config:
        raise ValueError(f"{path} is no checkpoint of fireq-jax; quantise it first: fireq-jax quantize {path} OUT")
    _, files = open_all(weight_files(path))
    native.check_block(hf_config["fireq"], files, str(path))
    return hf_config, files

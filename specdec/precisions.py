"""Names of the weights' precisions, for help pages too: nothing here loads torch."""

from __future__ import annotations

SCHEME_NAMES = ("int8", "w8a8", "int4", "int4-g128", "w4a8", "nf4", "fp6")
"""Of ``specdec.quantization.SCHEMES``."""

STORED_NAMES = ("gguf", "gguf-a8")
"""What ``quantize=`` takes to keep a GGUF file's own blocks (``specdec.quantized_checkpoints``)."""

STORED_IN_8_BIT = "gguf-a8"
"""Of these, the one whose activations are in 8 bit."""

DECODED = ("nf4", "fp6")
"""Those whose weights are decoded in each call, for PyTorch's own product."""

BY_GROUPS_IN_8_BIT = ("w4a8", STORED_IN_8_BIT)
"""Those whose activations are in 8 bit by groups, which our own CPU kernels alone compute."""

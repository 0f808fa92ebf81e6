"""Where the numeric suite of the Triton kernels runs: compiled on a GPU, or in Triton's interpreter, or not here."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

collect_ignore_glob: list[str] = []
if find_spec("triton") is None:
    collect_ignore_glob += ["numeric/*"]
elif INTERPRETED:
    import interpreter

    interpreter.install()
elif not torch.cuda.is_available():
    collect_ignore_glob += ["numeric/*"]  # test_triton_interpreter.py runs it

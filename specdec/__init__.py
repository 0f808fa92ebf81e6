"""Speculative and parallel decoding for any Hugging Face language model: the same text, sooner."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from specdec.conversation import Conversation
    from specdec.decoder import SpecDecoder
    from specdec.kept_prefix import KeptPrefix
    from specdec.result import GenerationResult, GenerationStream, StreamPiece
    from specdec.sampling import SamplingParams
    from specdec.stats import DecodeStats

__version__ = "0.1.0"

__all__ = [
    "Conversation",
    "DecodeStats",
    "GenerationResult",
    "GenerationStream",
    "KeptPrefix",
    "SamplingParams",
    "SpecDecoder",
    "StreamPiece",
    "__version__",
]

_HOMES = {
    "Conversation": "specdec.conversation",
    "DecodeStats": "specdec.stats",
    "GenerationResult": "specdec.result",
    "GenerationStream": "specdec.result",
    "KeptPrefix": "specdec.kept_prefix",
    "SamplingParams": "specdec.sampling",
    "SpecDecoder": "specdec.decoder",
    "StreamPiece": "specdec.result",
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first asked for, so that ``import specdec`` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'specdec' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)

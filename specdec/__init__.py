"""Speculative and parallel decoding for any Hugging Face language model: the same text, sooner."""

from specdec.decoder import SpecDecoder
from specdec.generation import KeptPrefix
from specdec.result import GenerationResult, GenerationStream, StreamPiece
from specdec.sampling import SamplingParams
from specdec.stats import DecodeStats

__version__ = "0.1.0"

__all__ = [
    "DecodeStats",
    "GenerationResult",
    "GenerationStream",
    "KeptPrefix",
    "SamplingParams",
    "SpecDecoder",
    "StreamPiece",
    "__version__",
]

"""A precision that a target is loaded in, by the name that benchmarks and their tables have for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch

from specdec.kv_quantized import find_kv
from specdec.models import DTYPES, find_dtype, load_model
from specdec.quantization import check_runs
from specdec.target import HFTarget


@dataclass(frozen=True)
class Precision:
    """What a target is loaded in.

    Attributes:
        weights: what ``quantize=`` is; None leaves them as they are.
        kv: what ``kv=`` is.
        dtype: of weights that are left as they are; None for the one that a benchmark was asked for.
    """

    weights: str | None = None
    kv: str | None = None
    dtype: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Of a dtype or a precision of weights, or of one and the cache's: ``bf16``, ``int8``, ``int8+kv-int4``; names
        are not checked."""
        weights, plus, kv = text.partition("+kv-")
        whole = weights in DTYPES
        return cls(None if whole else weights, kv if plus else None, weights if whole else None)

    def label(self, dtype: str) -> str:
        """How tables name it; ``dtype`` is what weights are in as they are."""
        return (self.weights or self.dtype or dtype) + ("" if self.kv is None else f", KV {self.kv}")

    def check(self, device: torch.device, dtype: str) -> None:
        """See that it can be made and computed with, before anything is loaded.

        Raises:
            ValueError: for an unknown name, or what the device or a missing library does not allow.
        """
        find_kv(self.kv)
        what = find_dtype(self.dtype or dtype)
        if self.weights is not None:
            check_runs(self.weights, device, what)

    def load(self, model: str, dtype: str, device: str) -> tuple[HFTarget, Any]:
        """The target and its tokenizer.

        Raises:
            ValueError: where ``load_model`` does, and for a model without a tokenizer.
        """
        loaded = load_model(model, dtype=self.dtype or dtype, device=device, packed=True, quantize=self.weights)
        if loaded.tokenizer is None:
            raise ValueError(f"{model!r} has no tokenizer: questions are text")
        target = HFTarget(loaded.model)
        target.kv_bits = find_kv(self.kv)
        return target, loaded.tokenizer

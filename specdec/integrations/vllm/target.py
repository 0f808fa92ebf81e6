"""What drafters may know of a target that vLLM runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from specdec.kv_cache import KVCache
from specdec.target import HFTarget, TargetOutput


class ServedTarget(HFTarget):
    """A vLLM model in place of a transformers one: drafters read its embeddings and output head, and never run it.

    Args:
        model: the loaded vLLM model.
        config: the transformers configuration of its decoder.
        vocab_size: V; vLLM pads its tables beyond it.
        device: where it runs.
        dtype: of its weights.
    """

    def __init__(self, model: Any, config: Any, vocab_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.model = _named_after(model)(model, vocab_size, dtype)
        self.config = config
        self._vocab_size, self._device = vocab_size, device

    @property
    def device(self) -> torch.device:
        """Where the target runs."""
        return self._device

    @property
    def vocab_size(self) -> int:
        """Width of the logits, V."""
        return self._vocab_size

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """Not there: vLLM keeps the target's cache."""
        raise TypeError("vLLM runs the target; a drafter cannot")

    def run(self, *args: Any, **kwargs: Any) -> TargetOutput:
        """Not there: vLLM runs the target."""
        raise TypeError("vLLM runs the target; a drafter cannot")


class ServedModel:
    """The few things of a transformers model that drafters use, read from vLLM's."""

    def __init__(self, model: Any, vocab_size: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._model = model
        self._vocab_size = vocab_size

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters by name, as vLLM calls them."""
        yield from self._model.named_parameters()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding table ``[V, d]``, shared.

        Raises:
            ValueError: where this process holds a part of it only.
        """
        inner = getattr(self._model, "model", self._model)
        table = self._rows(getattr(inner, "embed_tokens", None), "embeddings")
        layer = nn.Embedding(table.shape[0], table.shape[1], device="meta")
        layer.weight = nn.Parameter(table, requires_grad=False)
        return layer

    def get_output_embeddings(self) -> nn.Linear:
        """The output head ``[V, d]``, shared.

        Raises:
            ValueError: where this process holds a part of it only.
        """
        head = getattr(self._model, "lm_head", None)
        weight = self._rows(head, "output head")
        bias = getattr(head, "bias", None)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias[: self._vocab_size].detach(), requires_grad=False)
        return layer

    def _rows(self, layer: Any, what: str) -> Tensor:
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
            raise ValueError(f"{type(self._model).__name__} has no {what} that a drafter could read")
        if weight.shape[0] < self._vocab_size:
            raise ValueError(
                f"this process holds {weight.shape[0]} of {self._vocab_size} rows of the {what}: drafters that read "
                "hidden states need tensor_parallel_size=1 and pipeline_parallel_size=1"
            )
        return weight[: self._vocab_size].detach()


def _named_after(model: Any) -> type[ServedModel]:
    """A class with the model's own name, which messages and the facts of a target show."""
    return type(type(model).__name__, (ServedModel,), {})

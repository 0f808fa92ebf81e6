"""Small draft models made to order: a few of the target's own layers, its embeddings, and rows of its output head."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdec.drafters import weights as weights_module
from specdec.drafters.heads import HeadModule, OutputHead, drafting_head, pack_head
from specdec.drafters.weights import DrafterWeights, TargetFacts, check_weights, load_weights
from specdec.lean_stack import make_lean
from specdec.packing import can_pack, pack_linears
from specdec.target import HFTarget

NAME = "model"
"""The drafter that such models are for."""

_NEVER = -1e4
"""Logit of a token outside the draft vocabulary where it must be finite."""


def choose_layers(num_layers: int, count: int) -> list[int]:
    """``count`` of the indices 0 .. ``num_layers`` - 1: half from the front, half or one more from the back.

    The ends learn far faster than layers evenly spaced (docs/draft-models.md).

    Raises:
        ValueError: where there are not so many.
    """
    _check_count(num_layers, count)
    front = count // 2
    return [*range(front), *range(num_layers - count + front, num_layers)]


def spaced_layers(num_layers: int, count: int) -> list[int]:
    """``count`` of the indices 0 .. ``num_layers`` - 1, evenly spaced, the first and the last among them; the first
    alone where ``count`` is 1.

    Raises:
        ValueError: where there are not so many.
    """
    _check_count(num_layers, count)
    return [round(place * (num_layers - 1) / max(count - 1, 1)) for place in range(count)]


def _check_count(num_layers: int, count: int) -> None:
    if not 1 <= count <= num_layers:
        raise ValueError(f"count must be in [1, {num_layers}], the target's layers, got {count}")


class PrunedLayers(HeadModule):
    """Layers of a target and a final norm: what of a draft model is trained and stored.

    Args:
        target: the model they are taken from; only its configuration matters here, see ``copy_layers``.
        layers: their indices in the target, ascending.
        vocab_size: tokens that can be drafted, V'; 0 for all.

    Raises:
        ValueError: for indices that are none, and targets whose layers cannot be taken out.
    """

    vocabulary: Tensor | None

    def __init__(self, target: HFTarget, layers: Sequence[int], vocab_size: int = 0) -> None:
        super().__init__()
        if not layers or list(layers) != sorted({*layers}) or not 0 <= layers[0] <= layers[-1] < target.num_layers:
            raise ValueError(f"layers must ascend within 0 .. {target.num_layers - 1}, got {list(layers)}")
        self.layers = list(layers)
        self._whole = [_empty_model(target, self.layers)]  # in a list: what it shares with the target is not ours
        self.body: Any = self._whole[0].base_model
        rows = torch.arange(vocab_size) if vocab_size else None
        self.register_buffer("vocabulary", rows)

    def forward(self, embedded: Tensor) -> Tensor:
        """What the output head reads, ``[B, T, d]``, of texts' embeddings ``[B, T, d]``, padded at the end."""
        positions = torch.arange(embedded.shape[1], device=embedded.device).unsqueeze(0)
        states: Tensor = self.body(inputs_embeds=embedded, position_ids=positions, use_cache=False).last_hidden_state
        return states

    @torch.no_grad()
    def copy_layers(self, target: HFTarget) -> None:
        """Set all weights to the target's own."""
        theirs = dict(target.model.base_model.named_parameters())
        for name, parameter in self.body.named_parameters():
            kind, *rest = name.split(".")
            source = ".".join([kind, str(self.layers[int(rest[0])]), *rest[1:]]) if kind == "layers" else name
            parameter.copy_(theirs[source])

    def model(self, target: HFTarget, device: torch.device, dtype: torch.dtype, packed: bool = True) -> Any:
        """The whole draft model, ready to draft; embeddings are the target's own where it is on the same device.

        Its head is ``packed`` for drafting where that helps, which nothing can be trained through.

        This module is part of it afterwards, and no longer one to train.
        """
        whole = self._whole[0]
        embeddings = target.model.get_input_embeddings()
        if device == target.device and packed:
            head: nn.Module = drafting_head(target, self.vocabulary)
        else:  # layouts for the target's device would not do
            if device != target.device:
                embeddings = copy.deepcopy(embeddings).to(device, dtype)
            head = OutputHead(target, self.vocabulary).to(device, dtype)
        self.requires_grad_(False).to(device, dtype)
        if self.vocabulary is not None:
            head = DraftHead(head, self.vocabulary, target.vocab_size)
        whole.set_input_embeddings(embeddings)
        whole.set_output_embeddings(head)
        return whole.eval()


class DraftHead(nn.Module):
    """Logits over the target's whole vocabulary, ``-inf`` where a token is not in the draft vocabulary.

    Args:
        rows: computes the logits of the tokens that are.
        vocabulary: ``[V']`` their ids.
        vocab_size: V.
    """

    vocabulary: Tensor

    def __init__(self, rows: nn.Module, vocabulary: Tensor, vocab_size: int) -> None:
        super().__init__()
        self.rows, self._size = rows, vocab_size
        self.register_buffer("vocabulary", vocabulary, persistent=False)

    @property
    def weight(self) -> Tensor:
        """``[V, d]``, a copy; zeros outside the draft vocabulary, see ``bias``."""
        rows: Any = self.rows
        whole: Tensor = rows.weight.new_zeros(self._size, rows.weight.shape[1])
        return whole.index_copy_(0, self.vocabulary, rows.weight.detach())

    @property
    def bias(self) -> Tensor:
        """``[V]``: what makes tokens outside the draft vocabulary improbable."""
        rows: Any = self.rows
        own = rows.weight.new_zeros(len(self.vocabulary)) if rows.bias is None else rows.bias.detach()
        return torch.full_like(own[:1], _NEVER).repeat(self._size).index_copy_(0, self.vocabulary, own)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., d]`` to ``[..., V]``."""
        logits: Tensor = self.rows(hidden)
        whole = logits.new_full((*logits.shape[:-1], self._size), -torch.inf)
        return whole.index_copy_(-1, self.vocabulary, logits)


def ships_any() -> bool:
    """Whether draft models ship at all; which one for a target, ``find_pretrained`` knows."""
    return any(weights_module.PRETRAINED.glob(f"{NAME}*"))


def read_pruned(name: str) -> DrafterWeights | None:
    """What a folder holds that ``specdec train model`` wrote; None where the name is not one's.

    Raises:
        ValueError: for the weights of another drafter, and damaged ones.
    """
    folder = Path(name).expanduser()
    if not name or not (folder / "config.json").is_file() or '"drafter"' not in (folder / "config.json").read_text():
        return None
    weights = load_weights(folder)
    if weights.drafter != NAME:
        raise ValueError(f"{folder} holds weights of drafter {weights.drafter!r}, no draft model: use that drafter")
    return weights


def build_pruned(
    weights: DrafterWeights,
    target: HFTarget,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    packed: bool = True,
) -> Any:
    """A draft model from its weights and the target it was made for.

    Args:
        weights: as ``read_pruned`` gives them.
        target: the model drafted for.
        device: where the draft model goes; the target's by default.
        dtype: of its weights; the target's by default.
        packed: lay linear layers out for drafting where that helps.

    Raises:
        ValueError: where they were made for another target.
    """
    check_weights(weights, NAME, TargetFacts.of(target))
    module = PrunedLayers(target, **weights.shape)
    weights.load_into(module)
    model = module.model(target, device or target.device, dtype or target.dtype, packed)
    if packed and can_pack(module):
        pack_linears(model, pack_head)  # in 8 bit: a draft need not be exact, and waits for its weights
        make_lean(model)
    return model


def _empty_model(target: HFTarget, layers: Sequence[int]) -> Any:
    """A model of the target's class with as many layers, not yet with values; embeddings and head are left out."""
    name = type(target.model).__name__
    config = copy.deepcopy(target.model.config)
    text = config.get_text_config(decoder=True)
    for key, value in text.to_dict().items():  # what the configuration says of each layer
        if isinstance(value, list) and len(value) == target.num_layers:
            setattr(text, key, [value[layer] for layer in layers])
    text.num_hidden_layers = len(layers)
    with torch.device("meta"):
        model = type(target.model)(config)
    body = model.base_model
    if not hasattr(body, "layers") or body.get_input_embeddings() is None or len(body.layers) != len(layers):
        raise ValueError(f"no layers can be taken out of {name}: it does not keep them as Llama does")
    model.set_input_embeddings(nn.Identity())
    model.set_output_embeddings(nn.Identity())
    for path in {key.rpartition(".")[0] for key, _ in body.named_buffers()}:  # rotary embeddings and their like
        owner, _, leaf = path.rpartition(".")
        setattr(body.get_submodule(owner), leaf, copy.deepcopy(target.model.base_model.get_submodule(path)))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                module.register_parameter(name, nn.Parameter(torch.zeros(parameter.shape)))
    return model

"""What a model must have to be served, and what its configuration says of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_ROUNDING, _ROUNDING_16 = 0.05, 0.5
"""Of logits, as a share of their spread: many times what rounding leaves, also of activations in 8 bit, and in 16-bit
floats, where another expert may be chosen for it."""


def check_model(model: Any) -> None:
    """Raise ValueError, with the reason, for a model that cannot be served, as far as that shows without running it."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; specdec serves decoder-only models")
    if model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no output head; load it with AutoModelForCausalLM")
    if getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{name} cannot be served: it keeps recurrent state beside what goes through transformers' attention "
            "interface, and a rejected draft could not be taken back from it"
        )
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(places) > 1:
        raise ValueError(f"{name} has its weights on {' and '.join(places)}: load it on one device")


def check_pass(model: Any, config: Any, asked: Mapping[int, int | None]) -> None:
    """See that every layer went through our attention, that every window the configuration names reached it, not just a
    mask we do not use, and that nodes of a tree can be told their places.

    Args:
        model: the whole model.
        config: the text model's.
        asked: by layer, the window that our attention was asked for in a pass; None for none.

    Raises:
        ValueError: where it is not so, with the layers.
    """
    name = type(model).__name__
    count = int(config.num_hidden_layers)
    missing = sorted(set(range(count)) - asked.keys())
    if missing:
        raise ValueError(
            f"{name} cannot be served: layers {missing} of {count} bypass transformers' attention interface or keep "
            "recurrent state"
        )
    _check_windows(name, config, asked)
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{name} cannot be served: it takes no position_ids, so a tree's nodes have no place")


def check_logits(model: Any, ours: Tensor, own: Tensor) -> None:
    """See that a model says with our attention what it says with its own.

    Args:
        model: the whole model.
        ours: ``[1, n, V]`` logits of a few tokens, computed with our attention; the last one's count, which sees most.
        own: the same with the model's.

    Raises:
        ValueError: where rounding does not explain how far they are apart, with the number.
    """
    last, expected = ours[0, -1].double(), own[0, -1].double()
    apart = float((last - expected).norm() / (expected - expected.mean()).norm())
    if apart > (_ROUNDING_16 if own.dtype.itemsize == 2 else _ROUNDING):  # which NaN is not
        raise ValueError(
            f"{type(model).__name__} cannot be served: with specdec's attention its logits are {apart:.0%} off its "
            "own. Its attention does more than it tells transformers' attention interface"
        )


def _check_windows(name: str, config: Any, asked: Mapping[int, int | None]) -> None:
    kinds = list(getattr(config, "layer_types", None) or [])
    size = getattr(config, "sliding_window", None)
    limit = find_max_context(config)
    if "chunked_attention" in kinds or getattr(config, "attention_chunk_size", None):
        raise ValueError(f"{name} cannot be served: it attends within chunks, which specdec does not implement")
    if size is None or getattr(config, "use_sliding_window", True) is False:
        return
    if limit is not None and size >= limit:
        return
    windowed = [i for i, kind in enumerate(kinds) if kind == "sliding_attention"] if kinds else [*asked]
    silent = [layer for layer in windowed if asked[layer] is None]
    if silent:
        raise ValueError(
            f"{name} cannot be served: its window of {size} tokens in layers {silent} is applied through the mask "
            "alone; load it with sliding_window=None if texts stay shorter"
        )


def configs_by_layer(config: Any) -> list[Any]:
    """A text model's configuration as each of its layers has it: heads may be more and wider in some, as in Gemma 4."""
    count = int(config.num_hidden_layers)
    if not getattr(config, "is_heterogeneous", False):
        return [config] * count
    return [config.per_layer_config[layer] for layer in range(count)]


def find_max_context(config: Any) -> int | None:
    """Most positions a model has, None where it sets no limit.

    LongRoPE (Ding et al. 2024) rotates by other angles once a text outgrows the length it was first trained on, those
    of earlier tokens included, which a cache of rotated keys cannot follow: that length is the limit.
    """
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings")
        limit = original or getattr(config, "original_max_position_embeddings", None) or limit
    return None if limit is None else int(limit)


def find_eos_token_ids(model: Any, config: Any) -> frozenset[int]:
    """A model's own end-of-sequence ids, from its generation settings and its text model's configuration."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), config):
        value = getattr(source, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or [])
    return frozenset(found)

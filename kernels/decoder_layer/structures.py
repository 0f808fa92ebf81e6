"""The structures of cpu.c, filled from tensors. Whoever fills one keeps the tensors alive."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Protocol

from torch import Tensor


class Numbers(IntEnum):
    """What a product multiplies: ``numbers``."""

    IN_16_BIT = 0
    WEIGHTS_IN_8_BIT = 1
    BOTH_IN_8_BIT = 2
    GROUPS_IN_8_BIT = 3
    GROUPS_IN_4_BIT = 4
    BYTES_BY_8_BIT_GROUPS = 5
    BYTES_BY_4_BIT_GROUPS = 6

    @property
    def takes_groups(self) -> bool:
        """Whether inputs are in 8 bit with a scale for every ``TOGETHER`` of them."""
        return self >= Numbers.BYTES_BY_8_BIT_GROUPS


class Panels(Protocol):
    """A weight as ``Kernels.product`` reads it; layouts are ``product.h``'s.

    Attributes:
        kind: what it is made of.
        weight: panels of ``PANEL`` output channels; channels beyond the last are 0.
        scales: of output channels or groups; None in 16 bit.
        shifts: ``[panels * PANEL]`` int32, 128 times the sum of each channel's weights, where inputs are in 8 bit with
            a scale per row; else None.
        bias: ``[out]`` bfloat16.
        in_features: input channels.
        out_features: output channels.
        group: inputs of a group; 0 without groups.
        has_zero_points: whether offsets of groups are zero points; else they are minima.
    """

    kind: Numbers
    weight: Tensor
    scales: Tensor | None
    shifts: Tensor | None
    bias: Tensor | None
    in_features: int
    out_features: int
    group: int
    has_zero_points: bool


def pointer_to(tensor: Tensor | None) -> int | None:
    """A tensor's address, NULL for None."""
    return None if tensor is None else tensor.data_ptr()


def _fields(pointers: str, numbers: str = "", *others: tuple[str, Any]) -> list[tuple[str, Any]]:
    return [
        *((name, ctypes.c_void_p) for name in pointers.split()),
        *((name, ctypes.c_long) for name in numbers.split()),
        *others,
    ]


class Attention(ctypes.Structure):
    """``attention_arguments``."""

    _fields_ = _fields(
        "qkv cos sin keys values lengths depth seen segments out starts",
        "batch nodes tree heads kv_heads width slots window levels",
        ("scale", ctypes.c_float), ("threads", ctypes.c_int),
        *((name, ctypes.c_long) for name in ("most", "whole", "pieces")),
    )  # fmt: skip


class Product(ctypes.Structure):
    """``product_arguments``."""

    _fields_ = _fields(
        "inputs weight scales shifts sizes bias residual out places", "rows in_width out_width group",
        *((name, ctypes.c_int) for name in ("kind", "zero_points", "threads")),
    )  # fmt: skip


class Linear(ctypes.Structure):
    """``linear``: a weight and its sizes."""

    _fields_ = _fields(
        "weight scales shifts bias", "in_width out_width group",
        *((name, ctypes.c_int) for name in ("kind", "zero_points")),
    )  # fmt: skip

    @classmethod
    def of(cls, panels: Panels) -> Linear:
        tensors = (panels.weight, panels.scales, panels.shifts, panels.bias)
        sizes = (panels.in_features, panels.out_features, panels.group)
        return cls(*(pointer_to(tensor) for tensor in tensors), *sizes, panels.kind, panels.has_zero_points)


class LayerArguments(ctypes.Structure):
    """``layer``: weights and sizes of a decoder layer."""

    _fields_ = [
        *((name, Linear) for name in ("qkv", "out", "gate_up", "down")),
        *_fields("input_norm mlp_norm"),
        *((name, ctypes.c_float) for name in ("input_eps", "mlp_eps", "scale")),
        *_fields("", "heads kv_heads width window"),
    ]

    @classmethod
    def of(
        cls, linears: tuple[Panels, Panels, Panels, Panels], norms: tuple[Tensor | None, Tensor],
        eps: tuple[float, float], scale: float, heads: int, kv_heads: int, width: int, window: int | None,
    ) -> LayerArguments:  # fmt: skip
        """For a layer's products (query-key-value, output, gate-up, down), the weights of its norms, and sizes.

        Without a first norm the layer reads what is normed already.
        """
        return cls(
            *(Linear.of(panels) for panels in linears), *(pointer_to(norm) for norm in norms), *eps, scale, heads,
            kv_heads, width, window or 0,
        )  # fmt: skip


class PassArguments(ctypes.Structure):
    """``pass``: what the layers of one pass share."""

    _fields_ = _fields(
        "cos sin lengths depth seen starts space keys values segments next",
        "batch nodes tree rows slots levels",
        ("threads", ctypes.c_int),
    )

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], shape: Sequence[int], rows: int, threads: int) -> PassArguments:
        """Of cosines, sines, lengths, depth, what is seen, starts and space; ``[B, n, M]``, and nodes of all rows."""
        return cls(*map(pointer_to, tensors), None, None, None, None, *shape, rows, 0, 0, threads)


class StackEnd(ctypes.Structure):
    """``stack_end``: the norm and the output head that follow the layers."""

    _fields_ = _fields("norm normed head logits places", "", ("eps", ctypes.c_float))


class Top(ctypes.Structure):
    """``top_arguments``."""

    _fields_ = _fields("logits best total index", "rows width count", ("bytes", ctypes.c_int))


class DraftWeights(ctypes.Structure):
    """``draft_weights``: weights of a drafter of a few decoder layers."""

    _fields_ = _fields(
        "layers fuse mix head embeddings embedding_norm state_norm norm cos sin vocabulary rates",
        "count rate_levels rate_ranks",
        *((name, ctypes.c_float) for name in ("fuse_eps", "embedding_eps", "state_eps", "eps")),
        *((name, ctypes.c_int) for name in ("scaled", "adds_normed")),
    )  # fmt: skip


class DraftCache(ctypes.Structure):
    """``draft_cache``: keys and values of its committed entries, layer by layer."""

    _fields_ = _fields("keys values lengths space", "batch slots", ("threads", ctypes.c_int))


class Growth(ctypes.Structure):
    """``growth``: how far a tree grows, and what becomes of it."""

    _fields_ = _fields("pending start", "depth width branching most_nodes all_nodes") + _fields(
        "tokens parents confidence"
    )


class Move(ctypes.Structure):
    """``move_arguments``."""

    _fields_ = _fields("buffers lengths path counts", "buffer_count batch heads slots columns size")

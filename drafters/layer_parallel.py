"""A draft model with the attentions of several layers at once (EasySpec, Wu et al. 2025)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, cast, get_args

import torch
from torch import distributed, nn

from specdec.batch import Batch
from specdec.drafters.layer_groups import How, LayerParallelModel
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.target import HFTarget
from specdec.tree import TokenTree

ATTENTIONS = ("auto", *get_args(How))
"""Values of the option ``attention``."""

RANK_TIMEOUT = timedelta(minutes=2)
"""How long a process waits for the others before it gives up."""


@dataclass(frozen=True)
class LayerParallelConfig(ModelConfig):
    """Options of the layer_parallel drafter, on top of the model drafter's; ``depth`` is at least 1 here.

    Attributes:
        group: layers whose attentions run at once, N; 1 drafts exactly as the model drafter.
        attention: how they run. "fused" makes batched products of them, "separate" runs one after the other, "ranks"
            shares them out among the processes of ``torchrun``; "auto" is "ranks" in such a process, else "fused".
    """

    group: int = 4
    attention: Literal["auto", "fused", "separate", "ranks"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1:
            raise ValueError(f"group must be at least 1, got {self.group}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {self.attention!r}")
        if self.depth == 0:
            raise ValueError(
                "depth must be at least 1 for drafter 'layer_parallel', got 0: no profile tells what passes of grouped "
                "layers take, so no depth can be planned"
            )


class LayerParallelDrafter(ModelDrafter):
    """The model drafter, its draft passes shortened by running groups of middle layers at once.

    Their keys and values are inexact and never kept: the next step's pass over what was accepted and the bonus token is
    an exact one (bonus calibration), so errors do not add up along the text. Text does not depend on any of it.

    With "ranks", every process runs the same program, with ``adaptive=False``: a policy that looks at the clock may
    decide otherwise in each, and one would wait for the others. ``SpecDecoder`` refuses it.
    """

    name = "layer_parallel"
    Config = LayerParallelConfig
    config: LayerParallelConfig

    def __init__(
        self, config: LayerParallelConfig | None = None, model: Any | None = None, tokenizer: Any | None = None
    ) -> None:
        config = config or LayerParallelConfig()
        several = int(os.environ.get("WORLD_SIZE", "1")) > 1 or (_initialized() and distributed.get_world_size() > 1)
        automatic = "ranks" if several else "fused"
        self._how = cast(How, automatic if config.attention == "auto" else config.attention)
        if self._how == "ranks":
            _join_ranks()
            self.in_step = distributed.get_world_size() > 1
        super().__init__(config, model, tokenizer)

    def _wrap(self, model: Any) -> HFTarget:
        wrapped = LayerParallelModel(model, self.config.group, self._how)
        self._groups: nn.ModuleList = wrapped.draft_layers  # seen here by who adds up memory
        return wrapped

    def expected_accepted(self, sizes: Sequence[int]) -> list[float] | None:
        return super().expected_accepted(sizes) if self.config.group == 1 else None  # rates are of exact passes

    def propose(self, batch: Batch) -> TokenTree:
        if self._how == "ranks":
            _check_agreement(batch)
        return super().propose(batch)


def _initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _join_ranks() -> None:
    """Meet the other processes that ``torchrun`` started; each takes the GPU of its local rank where there are any."""
    if _initialized():
        return
    if "WORLD_SIZE" not in os.environ:
        raise ValueError("attention='ranks' needs the processes of torchrun, or an initialised torch.distributed")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=RANK_TIMEOUT)


def _check_agreement(batch: Batch) -> None:
    """Raise where processes are about to draft for different texts or sizes: their results would be mixed up."""
    state = [batch.max_nodes, *(value for row in batch.rows for value in (len(row.tokens), row.tokens[-1]))]
    states: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(states, state)
    if any(other != state for other in states):
        raise RuntimeError(
            f"the processes draft for different states {states}: run the same prompts in all, with adaptive=False "
            "(--fixed-trees) and a seed"
        )

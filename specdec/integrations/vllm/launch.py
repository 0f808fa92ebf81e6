"""How vLLM is told of a drafter: its configuration as JSON, and the command that serves."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specdec.integrations.vllm import PROPOSER
from specdec.integrations.vllm.settings import Settings, chain_options
from specdec.registry import create_drafter


@dataclass(frozen=True)
class Launch:
    """A target and a drafter in vLLM.

    Attributes:
        model: folder or hub id of the target.
        settings: the drafter.
        num_tokens: k, most tokens drafted per step.
    """

    model: str
    settings: Settings
    num_tokens: int = 5

    def __post_init__(self) -> None:
        if self.num_tokens < 1:
            raise ValueError(f"at least 1 token must be drafted per step, got {self.num_tokens}")
        name = self.settings.drafter
        create_drafter(name, chain_options(name, self.settings.options, self.num_tokens))  # wrong options show here

    @property
    def speculative_config(self) -> dict[str, Any]:
        """vLLM's ``speculative_config``."""
        return {"method": "custom_class", "model": PROPOSER, "num_speculative_tokens": self.num_tokens}

    @property
    def additional_config(self) -> dict[str, Any]:
        """vLLM's ``additional_config``, which holds ours."""
        return self.settings.to_json()

    def command(self) -> Sequence[str]:
        """``vllm serve`` with both."""
        return [
            "vllm", "serve", self.model,
            "--speculative-config", json.dumps(self.speculative_config),
            "--additional-config", json.dumps(self.additional_config),
        ]  # fmt: skip

    def to_json(self) -> Mapping[str, Any]:
        """Both configurations and the command."""
        return {
            "model": self.model,
            "speculative_config": self.speculative_config,
            "additional_config": self.additional_config,
            "command": shlex.join(self.command()),
        }

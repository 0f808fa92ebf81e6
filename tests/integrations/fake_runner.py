"""A stand-in for vLLM's scheduler and model runner: the parts a proposer meets, over a transformers model.

Requests are computed in the chunks, batches and order that a test asks for, with drafts checked greedily, as vLLM does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specdec.integrations.vllm import hooks
from specdec.integrations.vllm.proposer import SpecdecProposer
from specdec.target import HFTarget

MAX_LEN = 64


def make_config(vocab_size: int, num_tokens: int, specdec: dict[str, Any] | None = None) -> SimpleNamespace:
    """What the proposer reads of a ``VllmConfig``."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=num_tokens),
        model_config=SimpleNamespace(max_model_len=MAX_LEN, get_vocab_size=lambda: vocab_size),
        additional_config={} if specdec is None else {"specdec": specdec},
    )


@dataclass
class Request:
    """A request and how far it has been computed."""

    tokens: list[int]
    num_prompt_tokens: int
    max_tokens: int
    computed: int = 0
    drafts: list[int] = field(default_factory=list)
    proposed: dict[int, list[int]] = field(default_factory=dict)  # number of tokens -> drafts made then
    accepted: int = 0

    @property
    def sampling_params(self) -> SimpleNamespace:
        return SimpleNamespace(max_tokens=self.max_tokens)

    @property
    def done(self) -> bool:
        return len(self.tokens) - self.num_prompt_tokens >= self.max_tokens


class BareRunner:
    """As much of ``GPUModelRunner`` as the hooks touch, before they do."""

    def __init__(self, target: HFTarget, proposer: SpecdecProposer) -> None:
        self.target, self.drafter = target, proposer
        self.max_model_len = MAX_LEN
        self.model_config = SimpleNamespace(hf_text_config=target.config)
        self.model = SimpleNamespace(set_aux_hidden_state_layers=self._set_layers)
        self.layers: tuple[int, ...] = ()
        self.use_aux_hidden_state_outputs = False
        self.requests: dict[str, Request] = {}
        self.finished: set[str] = set()
        self.execute_model_state: Any = None
        proposer.bind(target, None)
        self._setup_eagle3_aux_hidden_state_outputs()

    def _set_layers(self, layers: tuple[int, ...]) -> None:
        self.layers = layers

    def _setup_eagle3_aux_hidden_state_outputs(self) -> None:
        """vLLM's own drafters set layers here; ours go through the hook."""

    def add(self, name: str, prompt: Sequence[int], max_tokens: int = 20) -> None:
        self.requests[name] = Request(list(prompt), len(prompt), max_tokens)

    def drop(self, name: str) -> None:
        """End a request, whatever its state."""
        del self.requests[name]
        self.finished.add(name)

    def idle(self) -> None:
        """A step without requests: the runner hears of those that ended, and asks no proposer."""
        self.finished = set()

    def preempt(self, name: str, cached: int = 0) -> None:
        """Throw out what was computed, all but a prefix that stays cached."""
        self.requests[name].computed = cached
        self.requests[name].drafts = []

    @torch.inference_mode()
    def run(self, order: Sequence[str], chunk: int = 1000, ask: bool = True) -> None:
        """One step over these requests, in this order, at most ``chunk`` tokens of a prompt each.

        Args:
            order: names.
            chunk: tokens computed of each at most, drafts not counted.
            ask: ask the proposer; vLLM does not where a request is near the end of the context.
        """
        scheduled = SimpleNamespace(
            num_scheduled_tokens={}, scheduled_spec_decode_tokens={}, finished_req_ids=self.finished
        )
        states: dict[Any, list[Tensor]] = {"last": [], **{layer: [] for layer in self.layers}}
        logits, sampled, firsts = [], [], []
        for name in order:
            request = self.requests[name]
            missing = min(len(request.tokens) - request.computed, chunk)
            whole = request.computed + missing == len(request.tokens)
            drafts = request.drafts if whole else []
            count = missing + len(drafts)
            scheduled.num_scheduled_tokens[name] = count
            if drafts:
                scheduled.scheduled_spec_decode_tokens[name] = list(drafts)
            text = [*request.tokens[: request.computed + missing], *drafts]
            seen = self._compute(text)
            firsts.append(request.computed)
            for feature, state in seen.items():
                states[feature].append(state[-count:])
            rows = self.target.model.get_output_embeddings()(seen["last"][-len(drafts) - 1 :])
            logits.append(rows)
            new: list[int] = []
            if whole:
                for draft, row in zip([*drafts, None], rows, strict=True):
                    new.append(int(row.argmax()))
                    if new[-1] != draft:
                        break
                request.accepted += len(new) - 1
            sampled.append(new)
            request.tokens += new
            request.computed += missing + max(len(new) - 1, 0)
        self.input_batch = SimpleNamespace(req_ids=list(order), num_computed_tokens_cpu=np.array(firsts))
        joined = {feature: torch.cat(parts) for feature, parts in states.items()}
        self.execute_model_state = SimpleNamespace(logits=torch.cat(logits), sampled=sampled)
        self.finished = set()
        if ask:
            drafts_made = self.sample_tokens(scheduled, joined)
            for name, made, new in zip(order, drafts_made, sampled, strict=True):
                self.requests[name].drafts = made
                if new:
                    self.requests[name].proposed[len(self.requests[name].tokens)] = made
        else:
            for name in order:
                self.requests[name].drafts = []

    def _compute(self, text: list[int]) -> dict[Any, Tensor]:
        """The target's states ``[n, d]`` at all tokens of a text."""
        output = self.target.extend([text], self.target.new_cache(1, len(text)), ("last", *self.layers))
        return {feature: state[0] for feature, state in output.features.items()}

    def sample_tokens(self, scheduled: Any, states: dict[Any, Tensor]) -> list[list[int]]:
        sampled, self.execute_model_state = self.execute_model_state.sampled, None
        aux = [states[layer] for layer in self.layers] if self.use_aux_hidden_state_outputs else None
        return self.propose_draft_token_ids(scheduled, sampled, states["last"], aux)

    def propose_draft_token_ids(
        self, scheduler_output: Any, sampled_token_ids: Any, hidden_states: Any, aux_hidden_states: Any
    ) -> list[list[int]]:
        names = self.input_batch.req_ids
        lengths = np.array([len(self.requests[name].tokens) for name in names])
        buffer = np.zeros((len(names), MAX_LEN), dtype=np.int32)
        for row, name in enumerate(names):
            buffer[row, : lengths[row]] = self.requests[name].tokens
        return self.drafter.propose(sampled_token_ids, lengths, buffer, slot_mappings=None)


class FakeRunner(BareRunner):
    """The same with hooks."""


hooks.install(FakeRunner)

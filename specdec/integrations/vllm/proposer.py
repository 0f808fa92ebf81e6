"""The proposer that vLLM makes, from ``speculative_config={"method": "custom_class", "model": PROPOSER, ...}``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

from specdec.drafters.base import Drafter
from specdec.integrations.vllm import hooks
from specdec.integrations.vllm.request import ServedRequest
from specdec.integrations.vllm.settings import Settings, chain_options
from specdec.integrations.vllm.step import Step
from specdec.integrations.vllm.target import ServedTarget
from specdec.registry import AUTO_DRAFTER, create_drafter
from specdec.target import Feature, HFTarget

logger = logging.getLogger("vllm.specdec")

T = TypeVar("T")


class SpecdecProposer:
    """Adapts a drafter to vLLM's ``propose``.

    A drafter that fails is switched off for good, with a warning; texts go on without drafts.

    Args:
        vllm_config: vLLM's configuration; ours is its ``additional_config["specdec"]`` (see ``Settings``).
        runner_class: the model runner to hook into; vLLM's where None.

    Attributes:
        sees_steps: tells the hooks that this proposer is theirs.
        features: hidden states the drafter wants.
        wants_logits: whether it learns from logits.
        off: why it was switched off; None while it runs.
    """

    sees_steps = True

    def __init__(self, vllm_config: Any, runner_class: type[Any] | None = None) -> None:
        self._config = vllm_config
        self._num_tokens = int(vllm_config.speculative_config.num_speculative_tokens)
        self._max_len = int(vllm_config.model_config.max_model_len)
        self._vocab_size = int(vllm_config.model_config.get_vocab_size())
        self._settings = Settings.read(vllm_config.additional_config)
        self._hooks = hooks.install(runner_class)
        self._drafter: Drafter | None = None
        self._device = torch.device("cpu")
        self._requests: dict[str, ServedRequest] = {}
        self._step: Step | None = None
        self.features: Sequence[Feature] = ()
        self.wants_logits = False
        self.off: str | None = None

    @property
    def drafter_name(self) -> str:
        """The drafter's name; "auto" until the target is there."""
        return self._settings.drafter if self._drafter is None else self._drafter.name

    @property
    def num_requests(self) -> int:
        """Requests of which something is kept."""
        return len(self._requests)

    def load_model(self, target_model: Any) -> None:
        """Meet the target, which vLLM has just loaded.

        Raises:
            ValueError: where drafter and target do not fit, or this version of vLLM lacks what the drafter needs.
        """
        model_config = self._config.model_config
        self._device = next(target_model.parameters()).device
        target = ServedTarget(
            target_model, model_config.hf_text_config, self._vocab_size, self._device, model_config.dtype
        )
        self.bind(target, _tokenizer(model_config))
        logger.info("specdec drafts with %s, up to %d tokens a step", self.drafter_name, self._num_tokens)

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        """Make the drafter for a target."""
        # Several drafters in one tree come to nothing here: a chain is what is checked.
        name = AUTO_DRAFTER if self._settings.drafter == "auto" else self._settings.drafter
        drafter = create_drafter(name, chain_options(name, self._settings.options, self._num_tokens))
        drafter.bind(target, tokenizer)
        self.features = tuple(drafter.features)
        self.wants_logits = not self.features and type(drafter).observe is not Drafter.observe
        needed = {hooks.STEPS} if self.features or self.wants_logits else set()
        needed |= {hooks.LOGITS} if self.wants_logits else set()
        needed |= {hooks.STATES} if any(feature != "last" for feature in self.features) else set()
        if not needed <= self._hooks:
            raise ValueError(
                f"drafter {name!r} needs vLLM's {', '.join(sorted(needed - self._hooks))}, which this version lacks"
            )
        self._drafter = drafter

    def see(self, read: Callable[[], Step]) -> None:
        """What the next ``propose`` is about; called by the hooks."""
        self._step = self._guarded(read)

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: Any,
        token_ids_cpu: Any,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for the rows of vLLM's batch.

        Args:
            sampled_token_ids: per row what this step sampled; nothing where a prompt is not through.
            num_tokens_no_spec: ``[rows]`` tokens of each, those just sampled included.
            token_ids_cpu: ``[rows, max_model_len]`` the tokens.
            slot_mappings: not used.
        """
        step, self._step = self._step, None
        if self.off is None:
            drafts = self._guarded(lambda: self._drafts(step, sampled_token_ids, num_tokens_no_spec, token_ids_cpu))
            if drafts is not None:
                return drafts
        return [[] for _ in sampled_token_ids]

    @torch.inference_mode()
    def _drafts(
        self, step: Step | None, sampled: Sequence[Sequence[int]], lengths: Any, token_ids: Any
    ) -> list[list[int]]:
        if step is not None:
            for req_id in self._requests.keys() - step.alive:
                self._requests.pop(req_id).finish()
        drafts = []
        for index, new in enumerate(sampled):
            seen = None if step is None else step.passes[index]
            tokens = np.asarray(token_ids[index, : int(lengths[index])])
            request = self._request(f"row {index}" if seen is None else seen.req_id, tokens)
            request.follow(tokens, seen, len(new))
            drafts.append(request.draft(self._num_tokens) if len(new) else [])
        return drafts

    def _request(self, name: str, tokens: Any) -> ServedRequest:
        """The request of a name, begun anew where its tokens are others than those known of it."""
        request = self._requests.get(name)
        if request is not None and not request.agrees(tokens):
            request.finish()
            request = None
        if request is None:
            assert self._drafter is not None
            request = ServedRequest(self._drafter, self._vocab_size, self._device, self._max_len)
            self._requests[name] = request
        return request

    def _guarded(self, call: Callable[[], T]) -> T | None:
        """What a call returns; None where it raises, and then nothing is drafted any more."""
        try:
            return call()
        except Exception as error:
            self.off = f"drafter {self.drafter_name!r} failed with {type(error).__name__}: {error}"
            self._requests.clear()
            logger.warning("%s; going on without drafts", self.off, exc_info=True)
            return None


def _tokenizer(model_config: Any) -> Any | None:
    """The target's tokenizer, None where vLLM runs without one or it cannot be had."""
    if getattr(model_config, "skip_tokenizer_init", False):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_config.tokenizer, revision=model_config.tokenizer_revision)
    except Exception as error:  # of many kinds; it only serves to compare vocabularies
        logger.info("the target's tokenizer is not at hand (%s)", error)
        return None

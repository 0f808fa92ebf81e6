"""Where we listen in on vLLM's model runner.

A ``custom_class`` proposer is handed tokens only: neither whose they are, nor hidden states, nor logits. The runner
holds them at that moment. So three of its methods are wrapped, in the process that makes a proposer of ours, once; for
other proposers they do what they did. A version that lacks one costs what the message says, nothing else.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from specdec.integrations.vllm import HOOKS
from specdec.integrations.vllm.step import aux_layers, num_layers, read_step

logger = logging.getLogger("vllm.specdec")

STEPS, LOGITS, STATES = HOOKS
"""The methods."""

_ARGUMENTS = {"scheduler_output", "hidden_states", "aux_hidden_states"}
_MARK = "_specdec_hook"


def install(runner_class: type[Any] | None = None) -> frozenset[str]:
    """Wrap what can be wrapped, unless it is already; the names of the methods that are.

    Args:
        runner_class: vLLM's ``GPUModelRunner`` where None; its CPU runner is derived from it.
    """
    if runner_class is None:
        try:
            from vllm.v1.worker.gpu_model_runner import GPUModelRunner
        except ImportError as error:
            logger.error("vLLM's model runner is not where it was (%s): %s", error, HOOKS[STEPS])
            return frozenset()
        runner_class = GPUModelRunner
    installed = set()
    for name, wrap in ((STEPS, _wrap_steps), (LOGITS, _wrap_logits), (STATES, _wrap_states)):
        method = getattr(runner_class, name, None)
        if getattr(method, _MARK, False):
            installed.add(name)
            continue
        wrapped = None if method is None else wrap(method)
        if wrapped is None:
            logger.error("this vLLM's model runner has no %s as it was: %s", name, HOOKS[name])
            continue
        setattr(wrapped, _MARK, True)
        setattr(runner_class, name, wrapped)
        installed.add(name)
    return frozenset(installed)


def _ours(runner: Any) -> Any | None:
    """The runner's proposer where it is ours."""
    drafter = getattr(runner, "drafter", None)
    return drafter if getattr(drafter, "sees_steps", False) else None


def _wrap_steps(method: Callable[..., Any]) -> Callable[..., Any] | None:
    signature = inspect.signature(method)
    if not signature.parameters.keys() >= _ARGUMENTS:
        return None

    @functools.wraps(method)
    def propose_draft_token_ids(self: Any, *args: Any, **kwargs: Any) -> Any:
        proposer = _ours(self)
        if proposer is not None:
            arguments = signature.bind(self, *args, **kwargs).arguments
            logits = getattr(self, "_specdec_logits", None)
            self._specdec_logits = None
            proposer.see(lambda: read_step(self, arguments, proposer.features, logits))
        return method(self, *args, **kwargs)

    return propose_draft_token_ids


def _wrap_logits(method: Callable[..., Any]) -> Callable[..., Any] | None:
    @functools.wraps(method)
    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        proposer = _ours(self)
        if proposer is not None and proposer.wants_logits:
            self._specdec_logits = getattr(getattr(self, "execute_model_state", None), "logits", None)
        return method(self, *args, **kwargs)

    return sample_tokens


def _wrap_states(method: Callable[..., Any]) -> Callable[..., Any] | None:
    @functools.wraps(method)
    def setup(self: Any, *args: Any, **kwargs: Any) -> Any:
        proposer = _ours(self)
        layers = () if proposer is None else aux_layers(proposer.features, num_layers(self))
        if proposer is None or not layers:
            return method(self, *args, **kwargs)
        if not hasattr(self.model, "set_aux_hidden_state_layers"):
            raise ValueError(
                f"drafter {proposer.drafter_name!r} reads the target's inner hidden states, and vLLM's "
                f"{type(self.model).__name__} does not hand them out (it has no EAGLE-3 interface)"
            )
        self.use_aux_hidden_state_outputs = True
        self.model.set_aux_hidden_state_layers(layers)
        return None

    return setup

"""Our drafters in vLLM: a ``custom_class`` proposer, and the plugin vLLM finds through its entry-point group.

Nothing of vLLM is changed by importing or registering. The proposer, where one is made, hooks into the model runner of
its process (see ``hooks``).
"""

from __future__ import annotations

import logging
import typing
from pathlib import Path

PROPOSER = "specdec.integrations.vllm.proposer.SpecdecProposer"
"""What ``speculative_config["model"]`` has to say."""

RUNNER = "vllm.v1.worker.gpu_model_runner"
"""The module whose ``GPUModelRunner`` the proposer hooks into."""

HOOKS = {
    "propose_draft_token_ids": "requests are told apart by their tokens, and drafters that read hidden states or "
    "logits are off",
    "sample_tokens": "drafters that learn from logits (recycling) are off",
    "_setup_eagle3_aux_hidden_state_outputs": "drafters that read hidden states before the last one (clover, eagle) "
    "are off",
}
"""Its methods that are wrapped, and what is lost without each."""

logger = logging.getLogger("vllm.specdec")  # below "vllm", so that its handlers print it


def register() -> None:
    """Called by vLLM in each of its processes, maybe more than once: say what is off with this version, if anything."""
    try:
        missing = _missing()
    except Exception as error:  # of another version, or of none at all; a plugin must not stop the engine
        missing = f"specdec's drafters are off: vLLM cannot be read ({type(error).__name__}: {error})"
    if missing and missing not in _said:
        _said.add(missing)
        logger.warning("%s", missing)


_said: set[str] = set()


def _missing() -> str | None:
    """What this vLLM lacks, in a sentence."""
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        return None  # whoever calls this without vLLM has nothing to be told
    import vllm
    from vllm.config import speculative

    if "custom_class" not in _names(getattr(speculative, "SpeculativeMethod", None)):
        return (
            f"specdec's drafters are off: vLLM {vllm.__version__} has no speculative method custom_class, which came "
            "with 0.20"
        )
    spec = importlib.util.find_spec(RUNNER)
    source = Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""
    # Read, not imported: most of vLLM's processes never load their model runner.
    lost = [f"without {name}, {what}" for name, what in HOOKS.items() if f"def {name}(" not in source]
    return f"this vLLM's model runner is not as it was: {'; '.join(lost)}" if lost else None


def _names(hint: object) -> set[str]:
    """All strings of a nested Literal."""
    found = {hint} if isinstance(hint, str) else set()
    for part in typing.get_args(hint):
        found |= _names(part)
    return found

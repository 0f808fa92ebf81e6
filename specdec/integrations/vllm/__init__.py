"""Our drafters in vLLM: a ``custom_class`` proposer, and the plugin vLLM finds through its entry-point group.

Nothing of vLLM is changed by importing or registering. The proposer, where one is made, hooks into the model runner of
its process (see ``hooks``).
"""

from __future__ import annotations

import logging
import typing

PROPOSER = "specdec.integrations.vllm.proposer.SpecdecProposer"
"""What ``speculative_config["model"]`` has to say."""

logger = logging.getLogger("vllm.specdec")  # below "vllm", so that its handlers print it


def register() -> None:
    """Called by vLLM in each of its processes, maybe more than once: say what is off with this version, if anything."""
    try:
        missing = _missing()
    except Exception as error:  # of another version, or of none at all; a plugin must not stop the engine
        missing = f"vLLM's speculative configuration cannot be read ({type(error).__name__}: {error})"
    if missing and missing not in _said:
        _said.add(missing)
        logger.warning("specdec's drafters are off: %s", missing)


_said: set[str] = set()


def _missing() -> str | None:
    """What this vLLM lacks, in words."""
    import importlib.util

    if importlib.util.find_spec("vllm") is None:
        return None  # whoever calls this without vLLM has nothing to be told
    import vllm
    from vllm.config import speculative

    if "custom_class" not in _names(getattr(speculative, "SpeculativeMethod", None)):
        return f"vLLM {vllm.__version__} has no speculative method custom_class, which came with 0.20"
    return None


def _names(hint: object) -> set[str]:
    """All strings of a nested Literal."""
    found = {hint} if isinstance(hint, str) else set()
    for part in typing.get_args(hint):
        found |= _names(part)
    return found

"""What a step of vLLM computed, in our words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from specdec.target import Feature


@dataclass(frozen=True)
class RequestPass:
    """One request's part of a step: the target ran over consecutive positions, the last of which may be drafts.

    Attributes:
        req_id: vLLM's name of the request.
        first: position of the first token computed; what is before it was computed earlier, or found in a cache.
        num_tokens: tokens computed, drafts included.
        drafts: the drafted tokens among them, which stand last; some or all may have been rejected.
        max_len: length at which the request must end.
        features: hidden states ``[num_tokens, d]`` the drafter asked for.
        logits: ``[len(drafts) + 1, V]`` after the last certain token and each draft; None where not wanted.
    """

    req_id: str
    first: int
    num_tokens: int
    drafts: Sequence[int]
    max_len: int
    features: Mapping[Feature, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """What a step computed.

    Attributes:
        passes: its requests, in the order of vLLM's batch.
        alive: names of all requests that have not ended, those that wait to be computed anew among them. What has
            ended is told by its absence: vLLM names it once, maybe in a step that asks for no drafts.
    """

    passes: Sequence[RequestPass]
    alive: frozenset[str]


def read_step(
    runner: Any,
    arguments: Mapping[str, Any],
    features: Sequence[Feature],
    logits: Tensor | None,
) -> Step:
    """Read a step off vLLM's model runner as it is about to ask for drafts.

    Args:
        runner: a ``GPUModelRunner``, or one derived from it.
        arguments: what its ``propose_draft_token_ids`` was called with, by name.
        features: hidden states wanted.
        logits: what the runner sampled from; None where not wanted.
    """
    scheduled = arguments["scheduler_output"]
    states = _states(arguments, features, runner)
    batch = runner.input_batch
    passes = []
    start = sampled = 0
    for index, req_id in enumerate(batch.req_ids):
        count = int(scheduled.num_scheduled_tokens[req_id])
        drafts = [int(token) for token in scheduled.scheduled_spec_decode_tokens.get(req_id, ())]
        rows = None if logits is None else logits[sampled : sampled + len(drafts) + 1]
        passes.append(
            RequestPass(
                req_id=req_id,
                first=int(batch.num_computed_tokens_cpu[index]),
                num_tokens=count,
                drafts=drafts,
                max_len=_max_len(runner, req_id),
                features={name: state[start : start + count] for name, state in states.items()},
                logits=rows,
            )
        )
        start += count
        sampled += len(drafts) + 1
    return Step(passes, frozenset(runner.requests))


def _states(arguments: Mapping[str, Any], features: Sequence[Feature], runner: Any) -> dict[Feature, Tensor]:
    """Hidden states ``[tokens of the step, d]`` by feature."""
    layers = aux_layers(features, num_layers(runner))
    aux = dict(zip(layers, arguments.get("aux_hidden_states") or (), strict=bool(layers)))
    states: dict[Feature, Tensor] = {}
    for name in features:
        states[name] = arguments["hidden_states"] if name == "last" else aux[_layer(name, num_layers(runner))]
    return states


def aux_layers(features: Sequence[Feature], total: int) -> tuple[int, ...]:
    """After how many layers vLLM is to keep the hidden states, ascending, as it hands them over.

    Args:
        features: what the drafter asks for.
        total: decoder layers of the target.
    """
    return tuple(sorted({_layer(name, total) for name in features if name != "last"}))


def _layer(name: Feature, total: int) -> int:
    if name == "pre_norm":
        return total
    if not isinstance(name, int) or not 0 <= name <= total:
        raise ValueError(f"unknown feature {name!r}: use 'last', 'pre_norm' or 0..{total}")
    return name


def num_layers(runner: Any) -> int:
    """Decoder layers of a runner's model."""
    return int(runner.model_config.hf_text_config.num_hidden_layers)


def _max_len(runner: Any, req_id: str) -> int:
    """The request's own limit where it has one, else the model's."""
    limit = int(runner.max_model_len)
    request = runner.requests.get(req_id)
    params = getattr(request, "sampling_params", None)
    prompt = getattr(request, "num_prompt_tokens", None)
    if params is None or prompt is None or params.max_tokens is None:
        return limit
    return min(limit, int(prompt) + int(params.max_tokens))

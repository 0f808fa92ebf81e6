"""What calls and the prefixes kept between them share of one budget."""

from __future__ import annotations

from dataclasses import replace

from specdec.drafter_plan import plan_drafter
from specdec.drafters.base import Drafter
from specdec.load_plan import SHORT, LoadPlan, check_load
from specdec.memory import free_bytes
from specdec.memory_plan import MemoryPlan, Workload, drafter_kv, drafter_weights, plan_memory, spare_behind
from specdec.model_shape import ModelShape
from specdec.prefix import SharedWork
from specdec.prefix_store import PrefixStore
from specdec.target import HFTarget


class CallMemory:
    """Plans a decoder's calls, and gives prefixes the room that calls leave.

    Args:
        target: the model.
        drafter: bound to it.
        budget: bytes in all, weights included; None is what is free.
        prefix_memory: bytes that prefixes may take at most.
        keeps: whether beginnings of prompts are kept unasked; None where texts are the same to the bit with it.
    """

    def __init__(
        self, target: HFTarget, drafter: Drafter, budget: int | None, prefix_memory: int, keeps: bool | None
    ) -> None:
        self._target, self._drafter, self._budget = target, drafter, budget
        self._prefix_memory, self._keeps = prefix_memory, keeps
        self._shape: ModelShape | None = None
        self._prefixes: PrefixStore | None = None
        self._drafter_weights: int | None = None  # bytes

    @property
    def shape(self) -> ModelShape:
        """What sizes depend on."""
        if self._shape is None:
            self._shape = ModelShape.of(self._target)
        return self._shape

    @property
    def prefixes(self) -> PrefixStore:
        """What is kept across calls."""
        if self._prefixes is None:
            keeps = self._target.invariant if self._keeps is None else self._keeps
            self._prefixes = PrefixStore(
                self._target, self._prefix_memory, self.shape.kv_bytes_per_token,
                keeps and self._target.refers_to_segments,
            )  # fmt: skip
        return self._prefixes

    def plan(self, work: Workload) -> MemoryPlan:
        """The most a call can have. Raises ValueError where it cannot run, with the numbers.

        Prefixes that nobody holds go where the call gains by it.
        """
        if self._drafter_weights is None:
            self._drafter_weights = drafter_weights(self._drafter, self._target)
        taken = self._drafter_weights + drafter_kv(self._drafter, work.rows, work.max_len)
        store = self._prefixes
        kept = 0 if store is None else store.num_bytes
        plan: MemoryPlan | None = None
        try:
            plan = plan_memory(self.shape, taken, work, self._left(kept, kept))
        except ValueError:
            if not kept:
                raise
        if store is not None and kept and (plan is None or (plan.rows, plan.nodes) != (work.rows, work.nodes)):
            better = plan_memory(self.shape, taken, work, self._left(kept, store.pinned_bytes))
            if plan is None or (better.rows, better.nodes) > (plan.rows, plan.nodes):
                store.clear()  # what is kept beyond calls is worth less than what this one gains
                plan = better
        assert plan is not None
        return plan

    def beside(self, plan: MemoryPlan) -> int | None:
        """Bytes that prefixes kept unasked may take beside a call; None where no budget is given."""
        return None if self._budget is None else self._budget - plan.total

    def _left(self, kept: int, staying: int) -> int | None:
        """Bytes for all but prefixes, where so many are kept now and so many would be; None where nobody knows."""
        if self._budget is not None:
            return self._budget - staying
        free, held = free_bytes(self._target.device), self._drafter_weights or 0
        # Weights and drafter are there already.
        return None if free is None else free + self.shape.weights + held + kept - staying


def plan_before_load(
    load: LoadPlan,
    drafter: Drafter,
    budget: int | None,
    *,
    rows: int = 1,
    prompt_len: int = SHORT.prompt_len,
    new_tokens: int = SHORT.max_len - SHORT.prompt_len,
    sampled: bool = False,
    kv_bits: int | None = None,
    adaptive: bool = True,
) -> MemoryPlan:
    """The plan that a decoder will make of a call, before its model is loaded; weights are what headers say of them.

    Args:
        load: the plan of loading the target.
        drafter: as it was created.
        budget: bytes in all; None is no limit.
        rows: completions, of prompts that share nothing.
        prompt_len: of each, tokens.
        new_tokens: of each, at most.
        sampled: whether tokens are drawn.
        kv_bits: of a number in the KV cache; None is the weights'.
        adaptive: as the decoder's.

    Raises:
        ValueError: for a number below 1 or a prompt that the model's context has no room for; as ``check_load`` does.
    """
    for name, value in (("rows", rows), ("prompt_len", prompt_len), ("new_tokens", new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    limit = load.max_context
    if limit is not None and prompt_len >= limit:
        raise ValueError(f"the prompt has {prompt_len} tokens, the model's context only {limit}: shorten it")
    max_len = prompt_len + new_tokens if limit is None else min(prompt_len + new_tokens, limit)
    planned = plan_drafter(drafter, load, rows, max_len)
    work = Workload.of(
        [(prompt_len, max_len)] * rows, drafter, sampled=sampled, shared=SharedWork.apart(rows, prompt_len - 1),
        refers=kv_bits is None, spare=spare_behind(drafter, [max_len - prompt_len] * rows, adaptive),
    )  # fmt: skip
    shape = replace(load.shape, kv_bits=kv_bits, compiled=load.shape.compiled and kv_bits is None)
    work = replace(work, features=planned.features)
    return check_load(replace(load, shape=shape), budget, planned.num_bytes, work)

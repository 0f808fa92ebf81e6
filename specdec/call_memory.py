"""What calls and the prefixes kept between them share of one budget."""

from __future__ import annotations

from specdec.drafters.base import Drafter
from specdec.memory import free_bytes
from specdec.memory_plan import MemoryPlan, Workload, drafter_kv, drafter_weights, plan_memory
from specdec.model_shape import ModelShape
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

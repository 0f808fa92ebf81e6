"""What a call will take of memory, known before it starts: trees, then the batch, shrink to fit (SpecMemo, 2025).

Only what grows with rows, length and nodes can be shrunk; weights and the drafter cannot. The plan adds up what is held
at the worst moment: attention or the MLP of a layer, for a chunk of the prompt or for a tree, or a tree's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from specdec.drafters.base import Drafter
from specdec.drafters.layer import DraftLayer
from specdec.drafters.none import NoneDrafter
from specdec.memory import size_text, storages
from specdec.model_shape import ModelShape, layer_bytes
from specdec.planner import RUNGS
from specdec.target import PREFILL_CHUNK, HFTarget

if TYPE_CHECKING:
    from specdec.prefix import SharedWork

SPARE_SLOTS = 64
"""Slots a cache has behind the longest possible text where drafts are made; larger trees make it grow."""

_TOKENS_PER_SPARE_SLOT = 32
"""New tokens of a text for each slot there is behind it where rows are many."""


@dataclass(frozen=True)
class Workload:
    """What a call asks for.

    Attributes:
        rows: completions.
        prompt_len: of the longest prompt, tokens.
        max_len: of the longest text, prompt included.
        nodes: most nodes of a row's tree.
        features: hidden states a drafter reads.
        sampled: whether tokens are drawn.
        shared: what prompts begin with alike, those of rows that wait included: it is held and computed once. None
            where nobody looks for it.
        refers: whether rows refer to it; else it is copied to them.
        joins: whether prompts of further rows are computed beside those that run, even where all of these rows do.
        spare: see ``spare_slots``; None is room for whole trees.
        new_tokens: most of a row; None is what the longest text has behind the longest prompt.
    """

    rows: int
    prompt_len: int
    max_len: int
    nodes: int
    features: int = 0
    sampled: bool = False
    shared: SharedWork | None = None
    refers: bool = True
    joins: bool = False
    spare: int | None = None
    new_tokens: int | None = None

    @classmethod
    def of(
        cls,
        texts: Sequence[tuple[int, int]],
        drafter: Drafter,
        *,
        sampled: bool = False,
        shared: SharedWork | None = None,
        refers: bool = True,
        joins: bool = False,
        spare: int | None = None,
    ) -> Workload:
        """What rows ask for.

        Args:
            texts: of each row the prompt's length and the longest text's, tokens.
            drafter: makes their trees.
            sampled, shared, refers, joins, spare: as the attributes.
        """
        return cls(
            rows=len(texts),
            prompt_len=max(prompt for prompt, _ in texts),
            max_len=max(longest for _, longest in texts),
            nodes=tree_size(drafter),
            features=len(drafter.every_feature),
            sampled=sampled,
            shared=shared,
            refers=refers,
            joins=joins,
            spare=spare,
            new_tokens=max(longest - prompt for prompt, longest in texts),
        )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by use at the worst moment, and what was planned for.

    Attributes:
        rows: decoded at a time.
        nodes: most nodes of a row's tree, 1 where there is no room for a draft.
        weights: the target's.
        drafter: weights and state.
        kv: keys and values.
        logits: of the nodes of a pass.
        masks: what each node sees, as the attention kernel wants it.
        activations: hidden states and what a layer holds besides.
    """

    rows: int
    nodes: int
    weights: int
    drafter: int
    kv: int
    logits: int
    masks: int
    activations: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.drafter + self.working

    @property
    def working(self) -> int:
        """Bytes beside the weights and the drafter."""
        return self.kv + self.logits + self.masks + self.activations

    def describe(self) -> str:
        """One line."""
        parts = [f"{f.name} {size_text(getattr(self, f.name))}" for f in fields(self)[2:]]
        return f"{', '.join(parts)}: {size_text(self.total)} for {self.rows} rows of {self.nodes} nodes"

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dumps``."""
        return {**asdict(self), "total": self.total}


def estimate(model: ModelShape, drafter: int, work: Workload, rows: int, nodes: int) -> MemoryPlan:
    """The plan for so many rows at a time with trees of so many nodes.

    Args:
        model: the target.
        drafter: bytes of the drafter.
        work: the call.
        rows: decoded at a time.
        nodes: of each row's tree.
    """
    prompt = work.prompt_len - 1
    joins = rows < work.rows or work.joins
    spare = max(SPARE_SLOTS, nodes) if work.spare is None or joins else work.spare
    behind = spare if nodes > 1 else 1
    capacity = work.max_len + behind
    passes: tuple[tuple[int, int, int], ...] = ((rows, prompt, prompt),)
    beside = known = 0
    own, computed = capacity, prompt  # tokens that a row holds itself, and of a prompt those that are computed for it
    if work.shared is not None:
        # Prefixes are those of all rows, so whichever run at a time hold no more than the longest rest.
        passes, beside, computed = work.shared.passes, work.shared.held(rows), work.shared.own
        known = sum(min(texts, rows) * longest for texts, _, longest in passes[:-1])
        if work.refers:
            new_tokens = work.max_len - work.prompt_len if work.new_tokens is None else work.new_tokens
            own = min(capacity, computed + 1 + new_tokens + behind)  # prompts are computed without their last token
    if joins:  # a prompt is computed beside the rows
        beside += computed if work.refers else prompt
    kv = rows * model.kv_bytes(own) + model.kv_bytes(beside)
    # Hidden states: of prefixes, of prompts as they are computed, and of all their tokens put together.
    held = work.features * (known + rows * (computed + prompt)) * model.hidden * model.element
    logits, visible = rows * nodes * model.vocab * model.element, rows * nodes * (work.max_len + nodes)
    # A compiled call goes on to the logits while it holds what the layers needed; a drafter may not have read yet.
    masks, activations = layer_bytes(model, rows, nodes, work.max_len + nodes)
    unread = work.features * rows * prompt * model.hidden * model.element
    moments = [(logits if model.compiled else 0, masks, activations + unread)]
    if prompt > 0:
        for texts, most, longest in passes:
            masks, activations = layer_bytes(model, min(texts, rows), min(most, PREFILL_CHUNK), longest)
            moments.append((0, masks, activations + held))
    choices = (3 if work.sampled else 1) * rows * model.vocab * 4
    if rows > 1:
        choices = max(choices, kv // model.layers)  # as rows end, a layer after the other is copied
    moments.append((logits + choices, visible, 3 * rows * nodes * model.hidden * model.element + unread))
    logits, masks, activations = max(moments, key=sum)
    return MemoryPlan(rows, nodes, model.weights, drafter, kv, logits, masks, activations)


def plan_memory(model: ModelShape, drafter: int, work: Workload, budget: int | None) -> MemoryPlan:
    """The largest plan within a budget: all rows and the whole tree, else smaller trees, else fewer rows.

    Args:
        model: the target.
        drafter: bytes of the drafter.
        work: the call.
        budget: bytes in all, weights included; None is no limit.

    Raises:
        ValueError: where one row without drafts does not fit, with the numbers.
    """
    rows = work.rows
    while True:
        for nodes in sorted({work.nodes, *(size for size in RUNGS if size < work.nodes)}, reverse=True):
            plan = estimate(model, drafter, work, rows, nodes)
            if budget is None or plan.total <= budget:
                return plan
        if rows == 1:
            raise ValueError(
                f"{size_text(plan.total)} are needed and {size_text(budget)} may be used: {plan.describe()}. Give more "
                "memory, shorten the prompt, or ask for fewer new tokens"
            )
        rows = (rows + 1) // 2


def spare_slots(new_tokens: int) -> int:
    """Slots behind the longest possible text, of so many new tokens, where trees are cut to what room there is.

    Each of many rows has them, so they are few: until a text has nearly reached its length there is room where its last
    tokens will stand, and then no deep tree is of use.
    """
    return min(SPARE_SLOTS, 1 + new_tokens // _TOKENS_PER_SPARE_SLOT)


def spare_behind(drafter: Drafter, new_tokens: Sequence[int], trees_vary: bool) -> int | None:
    """Few slots behind the texts of many rows where their trees may be cut; None for room for whole ones.

    Args:
        drafter: makes the trees.
        new_tokens: most of each row.
        trees_vary: whether trees may be smaller than the drafter makes them, unasked.
    """
    whole = not trees_vary or len(new_tokens) == 1 or isinstance(drafter, NoneDrafter) or drafter.virtual_nodes
    return None if whole else spare_slots(max(new_tokens))


def drafter_weights(drafter: Drafter, target: HFTarget) -> int:
    """Bytes of a drafter's weights and tables; what it shares with its target, embeddings say, is the target's."""
    own = storages(_held(drafter))
    theirs = storages([*target.model.parameters(), *target.model.buffers()]) if own else {}
    return sum(size for key, size in own.items() if key not in theirs)


def drafter_kv(drafter: Drafter, rows: int, length: int) -> int:
    """Bytes of the keys and values that a drafter's own model or layers keep of texts of this length, at most."""
    count = 0
    for value in vars(drafter).values():
        if isinstance(value, HFTarget):
            count += ModelShape.of(value).kv_bytes(length + SPARE_SLOTS)
        elif isinstance(value, nn.Module):
            count += layers_kv(value, length)
    return rows * count + sum(drafter_kv(part, rows, length) for part in drafter.parts)


def layers_kv(module: nn.Module, length: int, element: int | None = None) -> int:
    """Bytes of the keys and values that a drafter's layers keep of one text of this length, at most.

    Args:
        module: holds them.
        length: tokens.
        element: bytes of a number; None for the weights'.
    """
    slots = max(PREFILL_CHUNK, 2 * (length + SPARE_SLOTS))  # their caches double where they are full
    layers = [layer for layer in module.modules() if isinstance(layer, DraftLayer)]
    return sum(
        slots * 2 * layer.shape.num_kv_heads * layer.shape.head_dim
        * (element or layer.post_attention_layernorm.weight.element_size())
        for layer in layers
    )  # fmt: skip


def held_bytes(drafter: Drafter) -> int:
    """Bytes of the weights and tables that a drafter holds so far."""
    return sum(storages(_held(drafter)).values())


def _held(drafter: Drafter) -> list[Tensor]:
    """The tensors a drafter holds, its parts' too."""
    tensors: list[Tensor] = []
    for value in vars(drafter).values():
        if isinstance(value, HFTarget | nn.Module):
            module = value.model if isinstance(value, HFTarget) else value
            tensors += [*module.parameters(), *module.buffers()]
        elif isinstance(value, Tensor):
            tensors.append(value)
    return tensors + [tensor for part in drafter.parts for tensor in _held(part)]


def tree_size(drafter: Drafter) -> int:
    """Most nodes of a drafter's trees, as far as its options tell."""
    if isinstance(drafter, NoneDrafter):
        return 1
    return max(1, int(getattr(getattr(drafter, "config", None), "max_nodes", SPARE_SLOTS)))

"""PPD (Chen et al. 2024, "Hardware-Aware Parallel Prompt Decoding"): prompt tokens that ride in the target's passes.

Below a node at position L hang virtual nodes at L + 1, ..., L + k, in a chain. They carry trained embeddings in place
of the tokens that are not known yet; what the target predicts at the i-th of them is a guess at the token at
L + i + 1. Those below the node accepted last are the guesses of the next step. They cost nothing but their places in a
pass that is run anyway, and their keys and values are never kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.drafters.growth import rank
from specdec.drafters.ppd_tree import Candidates, Plan, attach, best_candidates, choose_budget, hit_table, make_plan
from specdec.drafters.weights import DrafterWeights, TargetFacts, check_weights, find_weights, load_weights
from specdec.latency import LatencyKey, load_curve
from specdec.planner import RUNGS
from specdec.target import HFTarget, TargetOutput
from specdec.tree import PADDING, TokenTree
from specdec.verifiers.base import Verdict

_LEAST_NODES = 4
"""Of a pass: a root, and a guess and prompt tokens below both."""


@dataclass(frozen=True)
class PPDConfig:
    """Options of PPD.

    Attributes:
        weights: folder that ``specdec train`` wrote; "" is what ships for the target.
        depth: prompt tokens below a node, at most those trained; the deepest guess.
        branching: guesses considered per distance.
        max_nodes: most nodes of a pass, root and prompt tokens included; where a profile of the target is kept, those
            are taken that it says are best.
        tree: how sure a guess is: the prompt token's own probability, or the calibrated hit rate of its rank.
    """

    weights: str = ""
    depth: int = 3
    branching: int = 10
    max_nodes: int = 32
    tree: Literal["confidence", "calibrated"] = "confidence"

    def __post_init__(self) -> None:
        for name, least in (("depth", 1), ("branching", 1), ("max_nodes", _LEAST_NODES)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


class PromptTokens(nn.Module):
    """The trained embeddings.

    Args:
        hidden_size: d.
        num_tokens: k, prompt tokens.
        ensembles: m embeddings per prompt token; they share its position, and their logits are averaged.
    """

    def __init__(self, hidden_size: int, num_tokens: int, ensembles: int = 1) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.zeros(num_tokens, ensembles, hidden_size))

    @property
    def num_tokens(self) -> int:
        """k."""
        return self.embeddings.shape[0]

    @property
    def ensembles(self) -> int:
        """m."""
        return self.embeddings.shape[1]

    def flat(self) -> Tensor:
        """``[m * k, d]``, chain after chain: the j-th embedding of the i-th prompt token is row ``j * k + i``."""
        return self.embeddings.transpose(0, 1).flatten(0, 1)


def average(logits: Tensor, dim: int) -> Tensor:
    """Float32 logits of an ensemble, averaged over a dimension.

    Averaging log-probabilities comes to the same: each member's differ from its logits by a constant.
    """
    return logits.float().mean(dim)


class PPDDrafter(Drafter):
    """Prompt tokens trained for the target guess several tokens ahead within its own passes.

    Weights with hit rates give the sizes of the trees (``make_plan``). Without, half of a pass are guesses, and all
    prompt tokens hang below the nodes most likely to be accepted last.

    Args:
        config: options.
        weights: loaded weights, instead of ``config.weights``.
        latency: nodes of a pass -> its measured time, in any unit; the best budget among them replaces
            ``config.max_nodes``. Needs hit rates. None for those of the target's profile, where one is kept, up to
            ``config.max_nodes``.
    """

    name = "ppd"
    Config = PPDConfig
    virtual_nodes = True
    reads_logits = False  # of passes without its prompt tokens, which are the ones that are kept for later

    def __init__(
        self,
        config: PPDConfig | None = None,
        weights: DrafterWeights | None = None,
        latency: Mapping[int, float] | None = None,
    ) -> None:
        self.config = config or PPDConfig()
        self._weights = weights
        self._latency = latency
        self.plan: Plan | None = None

    def weights_folder(self, target: TargetFacts) -> Path | None:
        return None if self._weights is not None else find_weights(self.name, self.config.weights, target)

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        facts = TargetFacts.of(target)
        weights = self._weights or load_weights(find_weights(self.name, self.config.weights, facts))
        check_weights(weights, self.name, facts)
        self.module = PromptTokens(**weights.shape)
        weights.load_into(self.module)
        self.module = self.module.to(target.device, target.dtype).eval().requires_grad_(False)
        self._num_tokens = min(self.config.depth, self.module.num_tokens)
        if weights.hit_rates:
            self._use_rates(weights.hit_rates, self._latency or self._profiled(target))
        elif self.config.tree == "calibrated" or self._latency is not None:
            raise ValueError(f"the weights of drafter {self.name!r} have no hit rates: run specdec calibrate")
        elif self.config.max_nodes < 2 * self.module.ensembles + 1:
            raise ValueError(
                f"max_nodes must be at least {2 * self.module.ensembles + 1} with {self.module.ensembles} embeddings "
                f"per prompt token, got {self.config.max_nodes}"
            )

    def _profiled(self, target: HFTarget) -> dict[int, float]:
        """Measured milliseconds of passes of up to ``max_nodes`` nodes; nothing without a profile."""
        curve = load_curve(LatencyKey.of(target))
        least = max(_LEAST_NODES, 2 * self.module.ensembles + 2)
        return {n: curve.at(n) for n in RUNGS if least <= n <= self.config.max_nodes} if curve else {}

    def _use_rates(self, rates: Sequence[Sequence[float]], latency: Mapping[int, float]) -> None:
        """Plan the trees, of the budget that is best by the latency of a pass, or as large as may be.

        There is at least one prompt token below every node, or none below some, whichever promises more.
        """
        table = hit_table([row[: self.config.branching] for row in rates], self._num_tokens)
        self._num_tokens = len(table)

        def plan(budget: int) -> Plan:
            plans = [make_plan(table, budget, self.module.ensembles, keep) for keep in (0, 1)]
            return max(plans, key=lambda made: made.tau)

        self.plan = choose_budget(latency, plan) if latency else plan(self.config.max_nodes)

    def expected_accepted(self, sizes: Sequence[int]) -> list[float] | None:
        """What the plan promises; its trees come whole or not at all."""
        if self.plan is None:
            return None
        return [self.plan.tau - 1.0 if size >= self.plan.budget else 0.0 for size in sizes]

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        self._states = [0] * len(batch)  # prompt tokens there were below each row's last accepted node
        self._logits: Tensor | None = None  # [B, k, V] at them

    def propose(self, batch: Batch) -> TokenTree:
        if max(row.max_depth for row in batch.rows) < 1:
            return TokenTree.from_pending(batch.pending)
        chances, tokens = self._guesses(batch)
        rows = []
        for index, row in enumerate(batch.rows):
            tree, attached = self._shape(min(self._states[index], max(row.max_depth, 0)), chances[index])
            guesses = zip(tree.distances[1:], tree.ranks[1:], strict=True)
            drafted = [tokens[index][distance - 1][place] for distance, place in guesses]
            rows.append((tree, attached, [row.pending, *drafted]))
        return self._assemble(batch, rows)

    def _guesses(self, batch: Batch) -> tuple[list[list[list[float]]], list[list[list[int]]]]:
        """Chance and token of the best guesses, per row, distance and rank."""
        depth = max(self._states)
        if self._logits is None or depth == 0:
            return [[] for _ in batch.rows], [[] for _ in batch.rows]
        root = TokenTree.from_pending(batch.pending)
        ranked = [
            rank(batch, self._logits[:, level - 1 : level], self.config.branching, root, 0, level)
            for level in range(1, depth + 1)
        ]
        chances = torch.cat([confidence for confidence, _ in ranked], dim=1).exp()
        return chances.tolist(), torch.cat([tokens for _, tokens in ranked], dim=1).tolist()

    def _shape(self, state: int, chances: Sequence[Sequence[float]]) -> tuple[Candidates, Sequence[int]]:
        """The guesses to check, and how many prompt tokens hang below each node."""
        ensembles = self.module.ensembles
        if self.plan is None:
            budget, gains = self.config.max_nodes, [1.0] * self._num_tokens
            size = (budget - 1) // 2 if state else 0
        elif self.config.tree == "calibrated":
            return self.plan.trees[state], self.plan.attached[state]
        else:
            budget, gains, size = self.plan.budget, list(self.plan.gains), self.plan.sizes[state]
        tree = best_candidates(chances[:state], size)
        return tree, attach(tree.last, gains, (budget - len(tree)) // ensembles, keep=0)

    def _assemble(self, batch: Batch, rows: Sequence[tuple[Candidates, Sequence[int], list[int]]]) -> TokenTree:
        """The token tree: guesses first, then the chains of prompt tokens."""
        all_tokens, all_parents, all_kinds = [], [], []
        for tree, attached, tokens in rows:
            parents, kinds = list(tree.parents), [-1] * len(tree)  # kind: row of ``PromptTokens.flat``
            for node, count in enumerate(attached):
                for member in range(self.module.ensembles):
                    above = node
                    for place in range(count):
                        parents.append(above)
                        kinds.append(member * self.module.num_tokens + place)
                        above = len(parents) - 1
            all_tokens.append(tokens + [0] * (len(parents) - len(tokens)))
            all_parents.append(parents)
            all_kinds.append(kinds)
        width = max(map(len, all_parents))

        def padded(values: list[list[int]], filler: int) -> Tensor:
            return torch.tensor([row + [filler] * (width - len(row)) for row in values], device=batch.device)

        kinds_at = padded(all_kinds, -1)
        return TokenTree(
            padded(all_tokens, 0),
            padded(all_parents, PADDING),
            virtual=kinds_at >= 0,
            embeddings=self.module.flat()[kinds_at.clamp(min=0)],
        )

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        rows = range(len(batch))
        last = [int(verdict.path[row, verdict.num_accepted[row]]) for row in rows]
        chains = [attached_chains(tree, row, node) for row, node in zip(rows, last, strict=True)]
        self._states = [min(map(len, members), default=0) for members in chains]
        columns = torch.zeros(len(batch), self._num_tokens, self.module.ensembles, dtype=torch.int64)
        for row, members in enumerate(chains):
            for member, chain in enumerate(members):
                columns[row, : len(chain), member] = torch.tensor(chain)
        columns = columns.to(output.logits.device)
        index = torch.arange(len(batch), device=columns.device).view(-1, 1, 1)
        self._logits = average(output.logits[index, columns], dim=2)

    def keep(self, batch: Batch, rows: Sequence[int]) -> None:
        self._states = [self._states[row] for row in rows]
        if self._logits is not None:
            self._logits = self._logits[list(rows)]

    def stop(self) -> None:
        self._logits = None


def attached_chains(tree: TokenTree, row: int, node: int) -> list[list[int]]:
    """Columns of the prompt tokens below a node, one chain per member of the ensemble, in order."""
    if tree.virtual is None:
        return []
    parents, virtual = tree.parents[row].tolist(), tree.virtual[row].tolist()
    chains: list[list[int]] = []
    ends: dict[int, list[int]] = {}  # last column of a chain -> the chain
    for column, (parent, is_virtual) in enumerate(zip(parents, virtual, strict=True)):
        if not is_virtual or parent < 0:
            continue
        if parent == node:
            chains.append([])
            ends[parent] = chains[-1]
        chain = ends.pop(parent, None)
        if chain is not None:
            chain.append(column)
            ends[column] = chain
    return chains

"""What drafters that read the target's hidden states have in common: Medusa, Clover, EAGLE."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from specdec.batch import Batch, Row
from specdec.drafters.base import Drafter
from specdec.drafters.foreign import read_foreign
from specdec.drafters.growth import grow, rank
from specdec.drafters.layer import DraftLayer
from specdec.drafters.weights import DrafterWeights, TargetFacts, check_weights, find_weights, load_weights
from specdec.group_panels import Group8PanelWeight
from specdec.optimal_tree import OptimalTrees
from specdec.packing import PackedLinear, can_pack, pack_linears, pack_weight
from specdec.panels import W8A8PanelWeight, panels_run
from specdec.target import Feature, HFTarget, TargetOutput
from specdec.tree import TokenTree, on_path
from specdec.verifiers.base import Verdict

MOST_PLANNED = 64
"""Nodes up to which the best tree is worth computing when weights are loaded; its time grows with the square."""


@dataclass(frozen=True)
class HeadConfig:
    """Options of a trained drafter.

    Attributes:
        weights: folder that ``specdec train`` wrote, or of a published checkpoint; "" is what ships for the target.
        depth: deepest node.
        width: nodes expanded per depth; a calibrated tree expands as many as the best one needs.
        branching: children considered per node.
        max_nodes: most nodes of a tree, root included.
        tree: how sure a node is: the head's own probability, or the calibrated hit rate of its rank and depth.
        allow_pickle: read checkpoints that are published as pickles only; nothing in them is run.
    """

    weights: str = ""
    depth: int = 5
    width: int = 4
    branching: int = 8
    max_nodes: int = 24
    tree: Literal["confidence", "calibrated"] = "confidence"
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "width", "branching", "max_nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class HeadModule(nn.Module):
    """A drafter's trained part.

    Attributes:
        features: hidden states of the target it reads.
        vocabulary: ``[V']`` int64, token ids it drafts; None for all.
        output: its own output head, from d to V'; None where it shares the target's.
    """

    features: Sequence[Feature]
    vocabulary: Tensor | None
    output: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.output = None


class OutputHead(nn.Module):
    """The target's output head, or the rows of it that a drafter needs: drafting over few tokens is cheap.

    Args:
        target: the model whose rows are used.
        vocabulary: ``[V']`` int64 token ids; None for all, which are then shared, not copied.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, target: HFTarget, vocabulary: Tensor | None) -> None:
        super().__init__()
        output = target.model.get_output_embeddings()
        weight, bias = output.weight.detach(), getattr(output, "bias", None)
        if vocabulary is not None:
            ids = vocabulary.to(weight.device)
            weight, bias = weight[ids], None if bias is None else bias[ids]
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V']`` of normed hidden states ``[..., d]``."""
        return nn.functional.linear(hidden, self.weight, self.bias)


def drafting_head(target: HFTarget, vocabulary: Tensor | None) -> nn.Module:
    """The target's own output head, or a layer of the rows a drafter needs, packed where that is faster.

    Args:
        target: the model whose rows are used.
        vocabulary: ``[V']`` int64 token ids; None for all.
    """
    whole: nn.Module = target.model.get_output_embeddings()
    if vocabulary is None:
        return whole
    rows = OutputHead(target, vocabulary)
    linear = nn.Linear(rows.weight.shape[1], rows.weight.shape[0], bias=rows.bias is not None, device="meta")
    linear.weight = nn.Parameter(rows.weight, requires_grad=False)
    if rows.bias is not None:
        linear.bias = nn.Parameter(rows.bias, requires_grad=False)
    return PackedLinear(linear, pack_head) if can_pack(linear) else linear


def pack_head(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The head's weight in 8 bit where our kernels run: it is half of what a draft reads, and need not be exact."""
    return W8A8PanelWeight(weight, bias) if W8A8PanelWeight.fits(weight) and panels_run() else pack_weight(weight, bias)


def pack_map(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """The same of maps that read raw states. A few of their channels are hundreds of times the others: activations in 8
    bit would lose the rest, and so would weights with one scale for all inputs of a channel.
    """
    fits = Group8PanelWeight.fits(weight) and panels_run()
    return Group8PanelWeight.of(weight, bias) if fits else pack_weight(weight, bias)


def make_vocabulary(counts: Tensor, size: int, always: Sequence[int] = ()) -> Tensor:
    """``[size]`` int64, ascending: the most frequent token ids, and those wanted in any case.

    Args:
        counts: ``[V]`` occurrences of every token.
        size: at most V.
        always: ids to include, end-of-sequence for one.
    """
    weighted = counts.double()
    weighted[list(always)] = torch.inf
    return weighted.argsort(descending=True, stable=True)[:size].sort().values


def optimal_trees(hit_rates: Sequence[Sequence[float]], config: HeadConfig) -> OptimalTrees:
    """Sequoia's trees for these rates, as large and deep as the options' trees, ``MOST_PLANNED`` nodes at most.

    Args:
        hit_rates: ``[D][R]``; deeper levels and further ranks are as the last.
        config: depth, branching and number of nodes.
    """
    table = []
    for level in range(config.depth):
        rates = [max(float(rate), 1e-4) for rate in hit_rates[min(level, len(hit_rates) - 1)]]
        rates = (rates + [rates[-1]] * config.branching)[: config.branching]
        table.append([rate / max(1.0, sum(rates)) for rate in rates])
    return OptimalTrees(table, min(config.max_nodes, MOST_PLANNED), config.depth)


def best_width(hit_rates: Sequence[Sequence[float]], config: HeadConfig) -> int:
    """Nodes to expand per depth for growth by these rates to end in Sequoia's best tree of the options' size."""
    nodes = min(config.max_nodes, MOST_PLANNED)
    width = optimal_trees(hit_rates, config).best(nodes, config.depth).width
    return max(1, width) if nodes == config.max_nodes else max(config.width, width)


def latest(states: Tensor, counts: Sequence[int], before: Tensor) -> Tensor:
    """``[B, d]`` of ``[B, n, d]`` each row's state at the last of so many, or the one it had where there are none."""
    if len(counts) == 1:
        return states[:, counts[0] - 1] if counts[0] else before
    count = torch.tensor(counts, device=states.device)
    rows = torch.arange(len(counts), device=states.device)
    return torch.where((count > 0).unsqueeze(1), states[rows, (count - 1).clamp(min=0)], before)


class HeadDrafter(Drafter):
    """A drafter with trained weights that follows the target's hidden states.

    Subclasses say how their module is built, what it remembers of the committed tokens, and what it drafts from that.

    Args:
        config: options.
        weights: loaded weights, instead of ``config.weights``.
    """

    Config: ClassVar[type[Any]] = HeadConfig
    reads_logits = False
    module: Any

    def __init__(self, config: HeadConfig | None = None, weights: DrafterWeights | None = None) -> None:
        self.config = config or self.Config()
        self._weights = weights
        self._hit_rates: Tensor | None = None
        self._calibration: Sequence[Sequence[float]] = ()
        self._expected: list[float] = []  # accepted nodes of the best tree of each size, once they are asked for
        self._width = int(self.config.width)

    @abstractmethod
    def make_module(self, shape: Mapping[str, Any]) -> HeadModule:
        """The module that weights of this shape belong to."""

    @abstractmethod
    def begin(self, batch_size: int) -> None:
        """A generation begins: forget all rows."""

    @abstractmethod
    def absorb(self, features: Mapping[Feature, Tensor], tokens: Tensor, counts: Sequence[int]) -> None:
        """Remember newly committed tokens.

        Args:
            features: ``[B, A, d]`` the target's hidden states at them.
            tokens: ``[B, A]`` int64, the token that follows each.
            counts: how many of the A are real in each row, which may be none.
        """

    @abstractmethod
    def logits(self, tree: TokenTree, first: int, level: int) -> Tensor:
        """Logits ``[B, n, V']`` of the children, at depth ``level``, of the nodes from column ``first`` on.

        n may be 1 where they do not depend on the node.
        """

    @abstractmethod
    def keep_rows(self, rows: Tensor) -> None:
        """Only these rows ``[B']`` go on, in this order."""

    def add_rows(self, other: Self) -> None:
        """Put the rows that another drafter with the same weights knows behind this one's; with ``takes_rows``."""
        raise NotImplementedError(f"drafter {self.name!r} takes no rows while others run")

    def weights_folder(self, target: TargetFacts) -> Path | None:
        return None if self._weights is not None else find_weights(self.name, self.config.weights, target)

    def load(self, target: HFTarget) -> DrafterWeights:
        """The weights to use with a target.

        Raises:
            ValueError: where there are none, or they are for another kind of drafter.
        """
        if self._weights is not None:
            return self._weights
        facts = TargetFacts.of(target)
        folder = find_weights(self.name, self.config.weights, facts)
        return read_foreign(folder, facts, self.config.allow_pickle) or load_weights(folder)

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        weights = self.load(target)
        check_weights(weights, self.name, TargetFacts.of(target))
        self.module = self.make_module(weights.shape)
        weights.load_into(self.module)
        self.module = self.module.to(target.device, target.dtype).eval().requires_grad_(False)
        self.features = tuple(dict.fromkeys(self.module.features))
        if can_pack(self.module):
            for part in self.module.modules():
                if isinstance(part, DraftLayer):  # reads normed states, which 8 bits hold well
                    pack_linears(part, pack_head)
            pack_linears(self.module, pack_map)
        self._head = self.module.output or drafting_head(target, self.module.vocabulary)
        self._calibration, self._expected = weights.hit_rates or (), []
        if self.config.tree == "calibrated":
            if not weights.hit_rates:
                raise ValueError(f"the weights of drafter {self.name!r} have no hit rates: run specdec calibrate")
            self._hit_rates = torch.tensor(weights.hit_rates, device=target.device).clamp(min=1e-4).log()
            self._width = best_width(weights.hit_rates, self.config)

    def expected_accepted(self, sizes: Sequence[int]) -> list[float] | None:
        if not self._calibration:
            return None
        if not self._expected:
            trees, most = optimal_trees(self._calibration, self.config), min(self.config.max_nodes, MOST_PLANNED)
            self._expected = [trees.best(size, self.config.depth).tokens - 1.0 for size in range(1, most + 1)]
        return [self._expected[min(size, len(self._expected)) - 1] for size in sizes]

    @property
    def max_depth(self) -> int:
        """Deepest node the module can draft."""
        return int(self.config.depth)

    def output_logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V']`` of what the module makes of hidden states."""
        logits: Tensor = self._head(hidden)
        return logits

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        self.begin(len(batch))
        self._read(batch.rows, output)

    def _read(self, rows: Sequence[Row], output: TargetOutput | None) -> None:
        """Absorb the prompts of rows that are new."""
        if output is None:
            return
        states = next(iter(output.features.values()))
        width = states.shape[1]
        following = [row.tokens[1:] + [0] * (width + 1 - len(row.tokens)) for row in rows]
        counts = [len(row.tokens) - 1 for row in rows]
        self.absorb(output.features, torch.tensor(following, device=states.device), counts)

    def join(self, batch: Batch, count: int, output: TargetOutput | None = None) -> None:
        later = copy.copy(self)
        later.begin(count)
        later._read(batch.rows[-count:], output)
        self.add_rows(later)

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        counts = [accepted + 1 for accepted in verdict.num_accepted]
        width = max(counts)
        following = [(tokens + [0] * width)[:width] for tokens in verdict.tokens]
        path = verdict.path[:, :width]
        self.absorb_path(output.features, path, torch.tensor(following, device=path.device), counts)

    def absorb_path(
        self, features: Mapping[Feature, Tensor], path: Tensor, tokens: Tensor, counts: Sequence[int]
    ) -> None:
        """``absorb`` of a tree's hidden states ``[B, N, d]``, those in columns ``[B, A]``."""
        self.absorb({name: on_path(states, path) for name, states in features.items()}, tokens, counts)

    def propose(self, batch: Batch) -> TokenTree:
        depth = min(self.max_depth, max(row.max_depth for row in batch.rows))
        max_nodes = min(self.config.max_nodes, batch.max_nodes)
        if depth < 1 or max_nodes < 2:
            return TokenTree.from_pending(batch.pending)
        if batch.ranks_logits:
            tree = self.compiled_tree(batch, depth, max_nodes)
            if tree is not None:
                return tree

        def expand(tree: TokenTree, first: int, level: int) -> tuple[Tensor, Tensor]:
            logits = self.logits(tree, first, level)
            at = first if logits.shape[1] == tree.num_nodes - first else 0
            confidence, tokens = rank(
                batch, logits, self.config.branching, tree, at, level, self.module.vocabulary
            )  # fmt: skip
            if self._hit_rates is not None:
                confidence = self._calibrated(confidence, level)
            num_nodes = tree.num_nodes - first
            return confidence.expand(-1, num_nodes, -1), tokens.expand(-1, num_nodes, -1)

        return grow(batch.pending, depth, self._width, min(max_nodes, batch.mean_nodes), expand)

    def compiled_tree(self, batch: Batch, depth: int, max_nodes: int) -> TokenTree | None:
        """The tree of rows whose logits rank their children as they are, by a kernel; None without one."""
        return None

    def _calibrated(self, confidence: Tensor, level: int) -> Tensor:
        """The hit rates of this depth in place of the head's own confidence; ranks beyond them are as the last."""
        assert self._hit_rates is not None
        rates = self._hit_rates[min(level, len(self._hit_rates)) - 1]
        ranks = torch.arange(confidence.shape[-1], device=rates.device).clamp(max=len(rates) - 1)
        return rates[ranks].expand_as(confidence).masked_fill(confidence.isneginf(), -torch.inf)

    def keep(self, batch: Batch, rows: Sequence[int]) -> None:
        if rows:
            self.keep_rows(torch.tensor(list(rows), device=batch.device))

"""A draft model sped up by prompt tokens of its own: k + 1 levels a pass (PPD on top of it, Chen et al. 2024)."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.drafters.ppd import PromptTokens, average
from specdec.drafters.weights import TargetFacts, check_weights, load_weights
from specdec.kv_cache import KVCache
from specdec.placement import DraftNodes
from specdec.target import HFTarget
from specdec.tree import PADDING, TokenTree

LONGEST_CHAIN = 16
"""Tokens of a row that go into one pass with its prompt tokens; longer gaps, a prompt for one, are closed before."""


class DraftPrompts:
    """Prompt tokens trained for a draft model.

    Args:
        folder: their weights, as ``specdec train ppd`` wrote them.
        model: the draft model.

    Raises:
        ValueError: where they are missing, damaged, or for another model.
    """

    def __init__(self, folder: Path, model: HFTarget) -> None:
        weights = load_weights(folder)
        check_weights(weights, "ppd", TargetFacts.of(model))
        module = PromptTokens(**weights.shape)
        weights.load_into(module)
        module = module.to(model.device, model.dtype).requires_grad_(False)
        self.num_tokens, self.ensembles = module.num_tokens, module.ensembles
        self._model = model
        self._flat = module.flat()  # [m * k, d]

    def catch_up(self, batch: Batch, cache: KVCache) -> Tensor:
        """Feed every token not seen yet, prompt tokens behind the pending one, which stays the tree's root.

        Returns:
            ``[B, 1, 1 + k, V]`` logits after the pending tokens and after their prompt tokens.
        """
        missing = [row.tokens[length:] for row, length in zip(batch.rows, cache.row_lengths, strict=True)]
        if max(map(len, missing)) > LONGEST_CHAIN:
            self._model.extend([tokens[:-1] for tokens in missing], cache)
            missing = [tokens[-1:] for tokens in missing]
        width = max(map(len, missing))
        device = self._model.device
        last = torch.tensor([len(tokens) - 1 for tokens in missing], device=device)
        columns = torch.arange(width, device=device)
        chain = TokenTree(
            torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in missing], device=device),
            (columns - 1).masked_fill(columns.unsqueeze(0) > last.unsqueeze(1), PADDING),
        )
        cache.reserve(cache.max_length + width + self.ensembles * self.num_tokens)
        logits = self._model.forward(self.below(chain, last.unsqueeze(1)), cache).logits
        cache.advance([len(tokens) - 1 for tokens in missing])
        own = logits[torch.arange(len(batch), device=device), last].view(len(batch), 1, 1, -1)
        return torch.cat([own.float(), self.guesses(logits[:, width:])], dim=2)

    def draft_nodes(self, beams: int) -> DraftNodes:
        """Of the passes for a tree, prompt tokens included, where so many nodes are expanded per level."""
        levels, below = self.num_tokens + 1, self.ensembles * self.num_tokens

        def nodes(depth: int, tokens: float) -> list[float]:
            further = math.ceil(depth / levels) - 1
            return [tokens + 1 + below, *[float(beams * (levels + below))] * further]

        return nodes

    def below(self, tree: TokenTree, nodes: Tensor) -> TokenTree:
        """The tree with prompt tokens below ``nodes`` ``[B, n]``, behind its own columns in the order ``[n, m, k]``."""
        size, count, device = tree.batch_size, nodes.shape[1], nodes.device
        added = count * self.ensembles * self.num_tokens
        behind = tree.num_nodes + torch.arange(added, device=device).view(1, count, self.ensembles, self.num_tokens)
        parents = (behind - 1).repeat(size, 1, 1, 1)
        parents[..., 0] = nodes.unsqueeze(2)
        parents = parents.masked_fill(~tree.valid.gather(1, nodes).view(size, count, 1, 1), PADDING)
        virtual = torch.arange(tree.num_nodes + added, device=device) >= tree.num_nodes
        embeddings = self._flat.repeat(count, 1)
        return TokenTree(
            torch.nn.functional.pad(tree.tokens, (0, added)),
            torch.cat([tree.parents, parents.flatten(1)], dim=1),
            virtual=virtual.expand(size, -1),
            embeddings=torch.nn.functional.pad(embeddings, (0, 0, tree.num_nodes, 0)).expand(size, -1, -1),
        )

    def guesses(self, logits: Tensor) -> Tensor:
        """``[B, n, k, V]`` from those at the columns that ``below`` added, averaged over the ensembles."""
        shape = (logits.shape[0], -1, self.ensembles, self.num_tokens, logits.shape[-1])
        return average(logits.view(shape), dim=2)


class Lookahead:
    """Logits of a growing tree's levels. A pass is run where the guesses of the one before are used up.

    Nodes of a level between passes are read off the prompt tokens below their ancestor of the last level computed: what
    stands between is not seen by them, as in PPD itself.

    Args:
        prompts: the prompt tokens.
        model: the draft model.
        cache: its cache, up to date.
        first: what ``DraftPrompts.catch_up`` returned.
    """

    def __init__(self, prompts: DraftPrompts, model: HFTarget, cache: KVCache, first: Tensor) -> None:
        self._prompts, self._model, self._cache = prompts, model, cache
        self._known = first  # [B, n, 1 + k, V] at the nodes of the last level computed
        self._level = 1  # of the children that their own logits are for
        self._column = 0  # where they start
        self._computed = 1  # columns whose keys and values are there

    def logits(self, tree: TokenTree, first: int, level: int) -> Tensor:
        """``[B, n, V]`` for the children, at depth ``level``, of the nodes from column ``first`` on."""
        if level - self._level > self._prompts.num_tokens:
            self._run(tree, first, level)
        nodes = torch.arange(first, tree.num_nodes, device=tree.tokens.device).expand(tree.batch_size, -1)
        for _ in range(level - self._level):
            nodes = tree.parents.gather(1, nodes).clamp(min=0)  # a padding node's is any
        at = (nodes - self._column).clamp(min=0)
        rows = torch.arange(tree.batch_size, device=nodes.device).unsqueeze(1)
        return self._known[rows, at, level - self._level]

    def _run(self, tree: TokenTree, first: int, level: int) -> None:
        """One pass over the nodes added since the last, prompt tokens below those from column ``first`` on."""
        nodes = torch.arange(first, tree.num_nodes, device=tree.tokens.device).expand(tree.batch_size, -1)
        widened = self._prompts.below(tree, nodes)
        self._cache.reserve(self._cache.max_length + widened.num_nodes)
        logits = self._model.forward(widened, self._cache, first_node=self._computed).logits
        own = logits[:, first - self._computed : tree.num_nodes - self._computed]
        guesses = self._prompts.guesses(logits[:, tree.num_nodes - self._computed :])
        self._known = torch.cat([own.float().unsqueeze(2), guesses], dim=2)
        self._level, self._column, self._computed = level, first, tree.num_nodes

"""The interface of an acceptance policy, and the walk down the tree that policies share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.tree import SiblingSampling, TokenTree


@dataclass(frozen=True)
class Verdict:
    """What a policy decided, on the host.

    Attributes:
        path: ``[B, P]`` int64 tree columns, the root first, then the accepted nodes; ignored past a row's length.
        num_accepted: accepted draft nodes per row, the root not counted.
        tokens: per row the accepted nodes' tokens and then the bonus token, which a failed row lacks.
        failed: rows whose logits were NaN at a node that had to be decided.
    """

    path: Tensor
    num_accepted: list[int]
    tokens: list[list[int]]
    failed: list[bool]


class Verifier(ABC):
    """Decides, from the target's logits at every node, what is emitted.

    Attributes:
        name: as given to ``SpecDecoder(verifier=...)`` and shown in the stats.
        lossless: whether emitted text is distributed exactly as the target's own.
        coupled: whether choices are a function of the rows' position noise.
        siblings: how the policy wants siblings to be chosen.
    """

    name: ClassVar[str]
    lossless: ClassVar[bool] = True
    coupled: ClassVar[bool] = False
    siblings: SiblingSampling = "deterministic"

    @abstractmethod
    def accept(self, tree: TokenTree, logits: Tensor, batch: Batch) -> Verdict:
        """Walk the tree.

        Args:
            tree: the tree the target checked.
            logits: ``[B, N, V]`` the target's logits at its nodes.
            batch: the rows; not changed.
        """


class TreeWalk:
    """A walk from the roots, all rows at once, that knows each row's node and what was seen on the way.

    Args:
        tree: the tree.
        logits: ``[B, N, V]``.
        batch: the rows.
    """

    def __init__(self, tree: TokenTree, logits: Tensor, batch: Batch) -> None:
        self._tree = tree
        self._logits = logits
        self._batch = batch
        self._rows = torch.arange(tree.batch_size, device=tree.tokens.device)
        self._seen = None if batch.seen is None else batch.seen.clone()
        self._node = torch.zeros_like(self._rows)
        self._path = [self._node]
        self._active = torch.ones_like(self._rows, dtype=torch.bool)
        self._accepted = torch.zeros_like(self._rows)
        self._bonus = torch.zeros_like(self._rows)
        self._failed = torch.zeros_like(self._active)

    @property
    def depth(self) -> int:
        """Depth of the nodes the active rows stand on."""
        return len(self._path) - 1

    @property
    def active(self) -> bool:
        """Whether some row still has to choose."""
        return bool(self._active.any())

    def scores(self) -> Tensor:
        """``[B, V]`` filtered logits at each row's node."""
        scores = self._batch.scores(self._logits[self._rows, self._node], self._seen)
        self._failed |= self._active & scores.isnan().any(-1)
        return scores

    def choose(self, tokens: Tensor) -> None:
        """Take a token ``[B]`` per row: descend where a child holds it, else it is the bonus and the row stops."""
        matches = self._tree.acceptable & (self._tree.parents == self._node.unsqueeze(1))
        matches &= self._tree.tokens == tokens.unsqueeze(1)
        descends = matches.any(1) & self._active & ~self._failed
        self._bonus = torch.where(self._active & ~descends, tokens, self._bonus)
        self._node = torch.where(descends, matches.to(torch.int8).argmax(1), self._node)
        self._path.append(self._node)
        self._accepted += descends
        self._active = descends
        if self._seen is not None:
            self._seen[self._rows, tokens] = True

    def verdict(self) -> Verdict:
        """The result, once no row is active."""
        return make_verdict(
            self._tree,
            torch.stack(self._path, dim=1)[:, :-1],
            self._accepted.tolist(),
            self._bonus.tolist(),
            self._failed.tolist(),
        )


def make_verdict(
    tree: TokenTree, path: Tensor, num_accepted: list[int], bonus: list[int], failed: list[bool]
) -> Verdict:
    """Collect a verdict's tokens from the path and the bonus tokens."""
    drafted = tree.tokens.gather(1, path).tolist()
    tokens = [
        row[1 : count + 1] + ([] if bad else [last])
        for row, count, last, bad in zip(drafted, num_accepted, bonus, failed, strict=True)
    ]
    return Verdict(path, num_accepted, tokens, failed)

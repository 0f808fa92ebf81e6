"""What remembers texts and continues others with trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from specdec.tree import TokenTree

Asked = tuple[Any, Sequence[int], int]
"""A text of ``begin``, the tokens it got since it was last asked for, and its tree's depth: below 1, only a root."""


class SuffixCorpus(Protocol):
    """Finished texts. Those in flight are beside it: a text is dropped by letting go of it."""

    def begin(self) -> Any:
        """A text in flight, empty as yet. Only ``draft`` of this corpus knows what to do with it."""

    def draft(self, asked: Sequence[Asked]) -> TokenTree:
        """Texts take in their new tokens; then a tree for each, with confidence, on the CPU.

        Its root is the text's last token. Nodes of the match that promises most stand first.
        """

    def remember(self, tokens: Sequence[int]) -> None:
        """Add a finished text to the corpus, which starts anew when it is full.

        A text that is longer than the corpus may become is left out. Texts in flight go on all the same.
        """

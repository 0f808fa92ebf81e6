"""Trees that continue texts by what followed their longest suffixes, there or in earlier texts. See README.md."""

from __future__ import annotations

from specdec.kernels.suffix import cpu
from specdec.kernels.suffix.corpus import Asked, SuffixCorpus
from specdec.kernels.suffix.reference import ReferenceCorpus

__all__ = ["Asked", "SuffixCorpus", "make_corpus"]


def make_corpus(max_nodes: int, nodes_per_match: float, min_probability: float, corpus_tokens: int) -> SuffixCorpus:
    """An empty corpus, compiled where there is a compiler; trees are the same without.

    Args:
        max_nodes: most nodes of a tree, root included.
        nodes_per_match: most nodes that a match may grow, per token of it; one at least.
        min_probability: of a node that is proposed, by what followed.
        corpus_tokens: most tokens of finished texts that are kept.
    """
    library = cpu.compiled()
    if library is None:
        return ReferenceCorpus(max_nodes, nodes_per_match, min_probability, corpus_tokens)
    return cpu.CompiledCorpus(library, max_nodes, nodes_per_match, min_probability, corpus_tokens)

"""From a tree to the chain that vLLM can check."""

from __future__ import annotations

from specdec.tree import TokenTree


def best_chain(tree: TokenTree, row: int, most: int, vocab_size: int) -> list[int]:
    """The path of first children from the root: columns stand in order of promise, so it is the most promising one.

    Args:
        tree: the drafter's.
        row: which of its rows.
        most: tokens wanted at most.
        vocab_size: the chain ends before a token that is outside of it.
    """
    chain: list[int] = []
    node = 0
    parents, tokens = tree.parents[row].tolist(), tree.tokens[row].tolist()
    acceptable = tree.acceptable[row].tolist()
    for column in range(1, len(parents)):
        if len(chain) >= most:
            break
        if parents[column] == node and acceptable[column]:
            if not 0 <= tokens[column] < vocab_size:
                break
            chain.append(tokens[column])
            node = column
    return chain

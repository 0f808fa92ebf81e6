"""Token trees: structure against plain Python, and what restructuring must preserve."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import specdec.kernels.trees as kernels_trees
import specdec.tree as tree_module
from specdec.kernels.trees import by_products, is_tree, tree_shape
from specdec.tree import PADDING, ROOT, TokenTree, TreeBuilder

VOCAB = 1000


@st.composite
def trees(draw: st.DrawFn) -> TokenTree:
    """Batches of random trees with padding anywhere but in front, some with virtual nodes.

    Every node has its own token, also written to its embedding and draft distribution, so that nodes can be told apart.
    """
    num_rows, num_nodes = draw(st.integers(1, 3)), draw(st.integers(1, 10))
    parents, virtual = [], []
    for _ in range(num_rows):
        row = [ROOT]
        for column in range(1, num_nodes):
            row.append(draw(st.sampled_from([PADDING, *(c for c in range(column) if row[c] != PADDING)])))
        parents.append(row)
        virtual.append([False, *(draw(st.booleans()) for _ in row[1:])])
    tokens = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    tokens = tokens[: num_rows * num_nodes].view(num_rows, num_nodes)
    label = tokens.float().unsqueeze(-1)
    if draw(st.booleans()):
        return TokenTree(tokens, torch.tensor(parents), draft_log_probs=label)
    return TokenTree(tokens, torch.tensor(parents), torch.tensor(virtual), label, label)


def path_of(parents: list[int], column: int) -> list[int]:
    """Columns from a node up to the root, itself first."""
    path = [column]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path


def nodes_of(tree: TokenTree) -> list[list[tuple[tuple[int, ...], bool]]]:
    """Per row, in order: each node's path of tokens and whether it is virtual; its payload is checked on the way."""
    rows = []
    for row, parents in enumerate(tree.parents.tolist()):
        nodes = []
        for column, parent in enumerate(parents):
            if parent == PADDING:
                continue
            path = tuple(int(tree.tokens[row, c]) for c in path_of(parents, column))
            virtual = tree.virtual is not None and bool(tree.virtual[row, column])
            for payload in (tree.embeddings, tree.draft_log_probs):
                assert payload is None or payload[row, column].tolist() == [path[0]]
            nodes.append((path, virtual))
        rows.append(nodes)
    return rows


@given(trees())
def test_ancestors_and_depth_equal_a_walk_up_the_parents(tree: TokenTree) -> None:
    for row, parents in enumerate(tree.parents.tolist()):
        for column in range(tree.num_nodes):
            path = path_of(parents, column)
            assert tree.ancestors[row, column].nonzero().flatten().tolist() == sorted(path)
            assert int(tree.depth[row, column]) == len(path) - 1


@given(trees())
def test_products_of_matrices_say_the_same_as_a_walk(tree: TokenTree) -> None:
    for walked, multiplied in zip(tree_shape(tree.parents), by_products(tree.parents), strict=True):
        assert torch.equal(walked, multiplied)


def test_ancestors_reach_the_root_of_a_long_chain() -> None:
    for length in (2, 3, 64, 65, 100):
        tree = TokenTree(torch.zeros(1, length, dtype=torch.int64), torch.arange(-1, length - 1).unsqueeze(0))

        assert torch.equal(tree.ancestors[0], torch.ones(length, length).tril().bool())
        assert tree.depth[0].tolist() == list(range(length))


@given(trees())
def test_acceptable_nodes_are_neither_root_padding_nor_virtual(tree: TokenTree) -> None:
    for row, parents in enumerate(tree.parents.tolist()):
        for column, parent in enumerate(parents):
            virtual = tree.virtual is not None and bool(tree.virtual[row, column])
            assert bool(tree.acceptable[row, column]) == (parent >= 0 and not virtual)
    assert tree.num_drafted.tolist() == tree.acceptable.sum(1).tolist()
    depths = [int(depth) for depth in tree.depth[tree.acceptable]]
    assert int(tree.draft_depth.max()) == max(depths, default=0)


@given(trees())
def test_sizes_and_drafts_equal_a_count(tree: TokenTree) -> None:
    parents = tree.parents.tolist()
    assert tree.sizes == [sum(parent != PADDING for parent in row) for row in parents]
    for row, (drafted, deepest) in enumerate(tree.drafts):
        columns = tree.acceptable[row].nonzero().flatten().tolist()
        assert (drafted, deepest) == (
            len(columns),
            max((len(path_of(parents[row], c)) - 1 for c in columns), default=0),
        )
    with mock.patch.object(kernels_trees, "_compiled", return_value=None):
        assert replace(tree).drafts == tree.drafts


@given(trees(), st.data())
def test_the_compiled_look_finds_what_the_long_one_does(tree: TokenTree, data: st.DataObject) -> None:
    plain = TokenTree(tree.tokens, tree.parents.clone())
    row, column = data.draw(st.integers(0, tree.batch_size - 1)), data.draw(st.integers(0, tree.num_nodes - 1))
    plain.parents[row, column] = data.draw(st.integers(-3, tree.num_nodes))
    vocab_size = data.draw(st.sampled_from([VOCAB, VOCAB // 2]))
    found = is_tree(plain.tokens, plain.parents, vocab_size)
    with mock.patch.object(tree_module, "is_tree", return_value=False):
        if found:
            plain.validate(vocab_size)
        else:
            with pytest.raises(ValueError, match=f"row {row}, " if vocab_size == VOCAB else "row"):
                plain.validate(vocab_size)


def validate(tree: TokenTree) -> None:
    """Validate with the label the strategy writes into ``draft_log_probs`` widened to the vocabulary."""
    label = tree.draft_log_probs
    replace(tree, draft_log_probs=None if label is None else label.expand(-1, -1, VOCAB)).validate(VOCAB)


def test_payloads_of_another_shape_are_named() -> None:
    root = tree_of([[ROOT, 0]])
    flags = torch.tensor([[False, True]])
    with pytest.raises(ValueError, match="embeddings must begin with"):
        replace(root, virtual=flags, embeddings=torch.zeros(1, 3, 4)).validate(5)
    with pytest.raises(ValueError, match="root is the pending token"):
        replace(root, virtual=~flags, embeddings=torch.zeros(1, 2, 4)).validate(5)
    with pytest.raises(ValueError, match="draft_log_probs must be"):
        replace(root, draft_log_probs=torch.zeros(1, 2, 4)).validate(5)


@given(trees())
def test_well_formed_trees_validate(tree: TokenTree) -> None:
    validate(tree)


@given(trees())
def test_values_at_padding_and_virtual_nodes_are_not_looked_at(tree: TokenTree) -> None:
    ignored = ~tree.acceptable
    ignored[:, 0] = False

    validate(replace(tree, tokens=tree.tokens.masked_fill(ignored, -12345)))


def tree_of(parents: list[list[int]], tokens: list[list[int]] | None = None) -> TokenTree:
    """A tree with these parents; tokens are 0 unless given."""
    return TokenTree(torch.tensor(tokens) if tokens else torch.zeros_like(torch.tensor(parents)), torch.tensor(parents))


@pytest.mark.parametrize(
    ("parents", "message"),
    [
        ([[ROOT, 0], [0, 0]], "row 1, node 0 has parent 0: the root"),
        ([[PADDING, 0]], "row 0, node 0 has parent -2"),
        ([[ROOT, ROOT]], "row 0, node 1 has parent -1"),
        ([[ROOT, 0, 2]], "row 0, node 2 has parent 2"),
        ([[ROOT, 2, 0]], "row 0, node 1 has parent 2"),
        ([[ROOT, 0], [ROOT, -3]], "row 1, node 1 has parent -3"),
        ([[ROOT, PADDING, 1]], "row 0, node 2 hangs on padding node 1"),
    ],
)
def test_broken_structure_is_named_by_row_and_node(parents: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tree_of(parents).validate(VOCAB)


@pytest.mark.parametrize("token", [-1, 5, 10**9])
@pytest.mark.parametrize("column", [0, 2])
def test_tokens_outside_the_vocabulary_are_named(token: int, column: int) -> None:
    tokens = [[0, 0, 0], [0, 0, 0]]
    tokens[1][column] = token

    with pytest.raises(ValueError, match=f"row 1, node {column} holds token {token}, outside the vocabulary of 5"):
        tree_of([[ROOT, 0, 0]] * 2, tokens).validate(5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(2, dtype=torch.int64), "parents": torch.zeros(2, dtype=torch.int64)}, r"\[B, N\]"),
        ({"tokens": torch.zeros(1, 2), "parents": torch.zeros(1, 3)}, r"got \(1, 2\) and \(1, 3\)"),
        ({"tokens": torch.zeros(1, 0), "parents": torch.zeros(1, 0)}, "N >= 1"),
        ({"tokens": torch.zeros(1, 1), "parents": torch.zeros(1, 1), "virtual": torch.zeros(1, 1)}, "need embeddings"),
        ({"tokens": torch.zeros(1, 1), "parents": torch.zeros(1, 1), "siblings": "with_replacement"}, "draft_log_p"),
    ],
)
def test_inconsistent_parts_are_refused_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenTree(**arguments)


@given(trees(), st.data())
def test_limit_depth_drops_deeper_nodes_and_nothing_else(tree: TokenTree, data: st.DataObject) -> None:
    limits = data.draw(st.lists(st.integers(0, 9), min_size=tree.batch_size, max_size=tree.batch_size))

    limited = tree.limit_depth(limits)

    validate(limited)
    expected = [[n for n in row if len(n[0]) - 1 <= limit] for row, limit in zip(nodes_of(tree), limits, strict=True)]
    assert nodes_of(limited) == expected
    if expected == nodes_of(tree):
        assert limited is tree
    else:
        assert limited.num_nodes == max(len(row) for row in expected)


@given(trees())
def test_compact_keeps_every_node_in_order_and_the_fewest_columns(tree: TokenTree) -> None:
    compacted = tree.compact()

    validate(compacted)
    assert nodes_of(compacted) == nodes_of(tree)
    assert compacted.num_nodes == max(len(row) for row in nodes_of(tree))
    for row, nodes in enumerate(nodes_of(tree)):
        assert compacted.valid[row].tolist() == [column < len(nodes) for column in range(compacted.num_nodes)]


@given(trees(), st.data())
def test_select_keeps_the_chosen_subtree(tree: TokenTree, data: st.DataObject) -> None:
    chosen: list[list[int]] = []
    for parents in tree.parents.tolist():
        mine = {0}
        for column, parent in enumerate(parents):
            if parent in mine and data.draw(st.booleans()):
                mine.add(column)
        chosen.append(sorted(mine))
    width = max(map(len, chosen))
    keep = torch.tensor([[place < len(row) for place in range(width)] for row in chosen])
    columns = torch.tensor([row + [0] * (width - len(row)) for row in chosen])

    selected = tree.select(columns, keep)

    validate(selected)
    expected = []
    for row, parents in enumerate(tree.parents.tolist()):
        tokens = tree.tokens[row].tolist()
        expected.append([tuple(tokens[c] for c in path_of(parents, column)) for column in chosen[row]])
    assert [[path for path, _ in row] for row in nodes_of(selected)] == expected


def test_from_rows_pads_shorter_rows_at_the_end() -> None:
    rows = [TreeBuilder(7, 4), TreeBuilder(8, 4)]
    rows[0].add_path([1, 2])

    tree = TokenTree.from_rows(rows)

    assert tree.tokens[:, 0].tolist() == [7, 8]
    assert tree.parents.tolist() == [[ROOT, 0, 1], [ROOT, PADDING, PADDING]]
    assert tree.num_drafted.tolist() == [2, 0]


def test_from_pending_is_one_root_per_row() -> None:
    tree = TokenTree.from_pending(torch.tensor([4, 5]))

    assert (tree.tokens.tolist(), tree.parents.tolist()) == ([[4], [5]], [[ROOT], [ROOT]])
    assert int(tree.draft_depth.max()) == 0


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=8), st.integers(1, 12))
def test_builder_is_the_trie_of_its_paths_cut_at_the_budget(paths: list[list[int]], max_nodes: int) -> None:
    builder = TreeBuilder(9, max_nodes)
    trie: list[tuple[int, ...]] = [()]
    for path in paths:
        builder.add_path(path)
        for length in range(1, len(path) + 1):
            prefix = tuple(path[:length])
            if prefix not in trie:
                if len(trie) == max_nodes:
                    break
                trie.append(prefix)

    tree = TokenTree.from_rows([builder])

    tree.validate(10)
    built = [tuple(int(tree.tokens[0, c]) for c in path_of(builder.parents, column)[-2::-1]) for column in
             range(tree.num_nodes)]  # fmt: skip
    assert built == trie
    assert builder.full == (len(trie) >= max_nodes)


def test_builder_finds_existing_nodes_even_when_full() -> None:
    builder = TreeBuilder(0, 2)

    assert builder.add(0, 5) == 1
    assert builder.add(0, 5) == 1
    assert builder.add(0, 6) is None
    assert builder.add(1, 5) is None


def test_builder_without_room_for_the_root_is_refused() -> None:
    with pytest.raises(ValueError, match="max_nodes must be at least 1"):
        TreeBuilder(0, 0)


def test_moving_to_a_device_keeps_every_part() -> None:
    label: Tensor = torch.arange(3.0).view(1, 3, 1)
    tree = TokenTree(
        torch.arange(3).unsqueeze(0), torch.tensor([[ROOT, 0, 1]]), torch.tensor([[False, False, True]]), label, label
    )

    assert nodes_of(tree.to("cpu")) == nodes_of(tree) == [[((0,), False), ((1, 0), False), ((2, 1, 0), True)]]
    meta = tree.to("meta")
    parts = (meta.tokens, meta.parents, meta.virtual, meta.embeddings, meta.draft_log_probs)
    assert all(part is not None and part.is_meta for part in parts)


def test_the_most_promising_nodes_are_those_of_all_rows() -> None:
    """Two chains and a star: of six nodes beside the roots the three likeliest, wherever they are."""
    parents = torch.tensor([[ROOT, 0, 1, 2], [ROOT, 0, 0, PADDING], [ROOT, 0, 1, 2]])
    chances = torch.tensor([[1.0, 0.9, 0.8, 0.7], [1.0, 0.6, 0.1, 0.0], [1.0, 0.2, 0.15, 0.01]])
    tree = TokenTree(torch.arange(12).view(3, 4), parents, confidence=chances)
    small = tree.most_promising(2)
    assert small.parents.tolist() == [[ROOT, 0, 1, 2], [ROOT, *[PADDING] * 3], [ROOT, *[PADDING] * 3]]
    assert small.tokens[0].tolist() == [0, 1, 2, 3]
    assert small.mean_nodes == 2.0
    larger = tree.most_promising(3).parents.tolist()
    assert larger == [[ROOT, 0, 1, 2], [ROOT, 0, PADDING, PADDING], [ROOT, 0, 1, PADDING]]
    assert tree.most_promising(4) is tree
    assert tree.mean_nodes == pytest.approx(11 / 3)


@given(trees(), st.integers(1, 10), st.integers(0, 99))
def test_the_compiled_choice_of_nodes_is_the_one_without_a_compiler(tree: TokenTree, count: int, seed: int) -> None:
    chances = torch.randint(1, 5, tree.tokens.shape, generator=torch.Generator().manual_seed(seed)) / 4  # many alike
    found = []
    for compiled in (kernels_trees._compiled(), None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels_trees, "_compiled", lambda compiled=compiled: compiled)
            each = TokenTree(tree.tokens, tree.parents, confidence=chances)
            found.append((each.standing, each.most_promising(count)))
    (places, kept), (expected_places, expected) = found
    assert torch.equal(places, expected_places)
    assert torch.equal(kept.parents, expected.parents)
    assert torch.equal(kept.tokens[kept.valid], expected.tokens[expected.valid])
    assert torch.equal(kept.confidence[kept.valid], expected.confidence[expected.valid])


def test_a_confidence_that_is_no_number_counts_as_none() -> None:
    parents = torch.tensor([[ROOT, 0, 1, 2], [ROOT, 0, 1, 2]])
    chances = torch.tensor([[1.0, torch.nan, 0.9, 0.8], [1.0, 0.6, 0.5, torch.nan]])
    tree = TokenTree(torch.arange(8).view(2, 4), parents, confidence=chances)
    for found in (tree.standing, kernels_trees._standing_by_sort(parents, chances)):
        assert found.tolist() == [[0, 2, 2, 3], [0, 1, 1, 3]]
    assert tree.most_promising(2).parents.tolist() == [[ROOT, *[PADDING] * 2], [ROOT, 0, 1]]


@given(trees(), st.integers(1, 10), st.integers(0, 99))
def test_how_nodes_stand_leaves_trees_whole(tree: TokenTree, count: int, seed: int) -> None:
    confidence = torch.rand(tree.tokens.shape, generator=torch.Generator().manual_seed(seed))
    tree = TokenTree(tree.tokens, tree.parents, confidence=confidence)  # a child may seem likelier than its parent
    kept = tree.most_promising(count)
    kept.validate(VOCAB)
    assert kept.parents[:, 0].tolist() == [ROOT] * tree.batch_size
    assert int(kept.valid.sum()) == min(int(tree.valid.sum()), count * tree.batch_size) or tree.batch_size == 1
    if tree.batch_size == 1:
        assert torch.equal(tree.standing, torch.arange(tree.num_nodes).unsqueeze(0))
    before, after = nodes_of(tree), nodes_of(kept)
    for all_nodes, some in zip(before, after, strict=True):
        assert set(some) <= set(all_nodes)
        assert [node for node in all_nodes if node in set(some)] == some


def test_sizes_of_rows_are_known_where_padding_stands_at_their_ends() -> None:
    def sizes(*parents: list[int]) -> list[int] | None:
        return TokenTree(torch.zeros(len(parents), len(parents[0]), dtype=torch.int64), torch.tensor(parents)).row_sizes

    assert sizes([ROOT, 0, 1], [ROOT, PADDING, PADDING]) == [3, 1]
    assert sizes([ROOT, 0, 1], [ROOT, 0, 0]) is None, "nothing is padded"
    assert sizes([ROOT, 0, 1], [ROOT, PADDING, 0]) is None

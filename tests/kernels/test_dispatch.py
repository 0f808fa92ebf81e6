"""What a GPU makes of a pass and of a verdict is what other devices make of it; and when it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from integration.architectures import VOCAB, tiny_model

from specdec import attention
from specdec.batch import Batch, Row
from specdec.kernels import accept as accept_op
from specdec.kernels import tree_attention as attention_op
from specdec.sampling import PositionNoise, SamplingParams
from specdec.target import HFTarget
from specdec.tree import PADDING, ROOT, TokenTree
from specdec.verifiers import match
from specdec.verifiers.base import Verdict
from specdec.verifiers.match import CoupledVerifier, GreedyVerifier, MatchVerifier


def random_tree(batch_size: int, num_nodes: int, vocab_size: int, seed: int = 0) -> TokenTree:
    """Rows of different shape, the last of them with padding in its middle."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab_size, (batch_size, num_nodes), generator=generator)
    parents = torch.full((batch_size, num_nodes), ROOT)
    for row in range(batch_size):
        for column in range(1, num_nodes):
            parents[row, column] = int(torch.randint(max(0, column - 3), column, (), generator=generator))
    parents[-1, 2] = PADDING
    parents[-1, 3:] = torch.where(parents[-1, 3:] == 2, 0, parents[-1, 3:])
    return TokenTree(tokens, parents)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_a_pass_by_rules_is_the_pass_by_a_matrix(name: str) -> None:
    """Windows, soft-caps, sinks and grouped heads; rows of different length; a tree computed in two passes."""
    target = HFTarget(tiny_model(name).double())
    tree = random_tree(3, 9, VOCAB)

    def logits() -> list[torch.Tensor]:
        cache = target.new_cache(3, 40)
        target.extend([list(range(3, 23)), [5], [7, 8, 9, 10]], cache)
        first = target.forward(tree.first(5), cache)
        rest = target.forward(tree, cache, first_node=5)
        return [first.logits, rest.logits]

    with torch.inference_mode():
        expected = logits()
        with (
            mock.patch.object(attention, "serves_rules", return_value=True),
            mock.patch.object(attention.AttentionPass, "mask", side_effect=AssertionError("a matrix was made")),
        ):
            found = logits()
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).abs().max()) <= 1e-5 * float(other.abs().max())  # rotary tables are float32


class Operands:
    """Operands the Triton kernel takes, on a device that has it as far as the dispatch can tell."""

    def __init__(self, nodes: int = 4, width: int = 64, dtype: torch.dtype = torch.bfloat16) -> None:
        self.query = torch.zeros(1, 4, nodes, width, dtype=dtype)
        self.keys = torch.zeros(1, 2, 10, width, dtype=dtype)

    def served(self) -> bool:
        return attention_op.serves_rules(self.query, self.keys, self.keys)


@pytest.fixture
def with_triton() -> Iterator[None]:
    """Every tensor is on a device with Triton."""
    with (
        mock.patch.object(attention_op, "runs_triton", return_value=True),
        mock.patch.object(accept_op, "runs_triton", return_value=True),
    ):
        yield


@pytest.mark.usefixtures("with_triton")
def test_what_the_kernels_serve() -> None:
    assert all(Operands(dtype=dtype).served() for dtype in (torch.float16, torch.bfloat16, torch.float32))
    assert Operands(nodes=attention_op.MOST_NODES, width=attention_op.MOST_WIDTH).served()
    assert not Operands(nodes=attention_op.MOST_NODES + 1).served()
    assert not Operands(width=attention_op.MOST_WIDTH + 1).served()
    assert not Operands(dtype=torch.float64).served()
    trained = Operands()
    trained.query.requires_grad_()
    assert not trained.served()
    with torch.no_grad():
        assert trained.served()
    assert accept_op.serves(torch.zeros(1, 1, 4, dtype=torch.bfloat16))
    assert not accept_op.serves(torch.zeros(1, 1, 4, dtype=torch.float64))


def test_a_cpu_keeps_its_own_paths() -> None:
    assert not Operands().served()
    assert not accept_op.serves(torch.zeros(1, 1, 4))


@pytest.mark.usefixtures("with_triton")
def test_float64_takes_the_reference_where_there_is_triton() -> None:
    """The operation itself, given rules: the Triton kernel has no float64."""
    operands = Operands(dtype=torch.float64)
    mask = attention_op.TreeMask(torch.tensor([6]), torch.eye(4).bool().unsqueeze(0), torch.zeros(1, 4).long())
    out = attention_op.tree_attention(operands.query, operands.keys, operands.keys, mask, 1.0)
    assert out.dtype == torch.float64


SETTINGS = {
    "greedy": SamplingParams(),
    "greedy, penalty": SamplingParams(repetition_penalty=1.5),
    "greedy, what greedy ignores": SamplingParams(top_k=1, top_p=0.1, min_p=0.5),
    "sampled": SamplingParams(temperature=0.7),
    "top-k": SamplingParams(temperature=1.3, top_k=3),
    "everything": SamplingParams(temperature=1.6, top_k=9, top_p=0.8, min_p=0.01, repetition_penalty=1.3),
}


def verdicts(tree: TokenTree, logits: torch.Tensor, params: SamplingParams) -> tuple[Verdict, Verdict]:
    """By the walk on the host, and by the operation."""
    verifier: MatchVerifier = GreedyVerifier() if params.greedy else CoupledVerifier()
    vocab_size = logits.shape[-1]
    rows = [
        Row([3] * b + [int(tree.tokens[b, 0])], 1, 99, params, PositionNoise(40 + b, torch.arange(vocab_size)))
        for b in range(tree.batch_size)
    ]
    batch = Batch(rows, vocab_size, coupled=verifier.coupled)
    walked = verifier.accept(tree, logits, batch)
    with mock.patch.object(match, "TreeWalk", None), mock.patch.object(match, "serves", return_value=True):
        return walked, verifier.accept(tree, logits, batch)


def same(one: Verdict, other: Verdict) -> None:
    assert (one.num_accepted, one.tokens, one.failed) == (other.num_accepted, other.tokens, other.failed)
    for row, count in enumerate(one.num_accepted):
        assert torch.equal(one.path[row, : count + 1], other.path[row, : count + 1])


@pytest.mark.parametrize("params", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_verdict_by_the_operation_is_that_of_the_walk(params: SamplingParams) -> None:
    accepted = 0
    for seed in range(6):
        tree = random_tree(3, 24, 5, seed)
        logits = 2.0 * torch.randn(3, 24, 5, generator=torch.Generator().manual_seed(seed))
        expected, found = verdicts(tree, logits, params)
        same(found, expected)
        accepted += sum(found.num_accepted)
    assert accepted > 6  # else the walks said nothing


@pytest.mark.parametrize("params", [SETTINGS["greedy"], SETTINGS["everything"]], ids=["greedy", "sampled"])
def test_a_row_without_a_verdict_and_nodes_that_must_not_be_accepted(params: SamplingParams) -> None:
    tree = TokenTree(torch.tensor([[1, 2, 3], [1, 2, 3], [1, 2, 3]]), torch.tensor([[ROOT, 0, 1]] * 3))
    virtual = torch.tensor([[False, False, False], [False, True, False], [False, False, False]])
    tree = replace(tree, virtual=virtual, embeddings=torch.zeros(3, 3, 4))
    logits = 200.0 * torch.nn.functional.one_hot(torch.tensor([[2, 3, 4]] * 3), 6).float()
    logits[2, 1, 0] = torch.nan
    expected, found = verdicts(tree, logits, params)
    same(found, expected)
    assert (found.num_accepted, found.failed) == ([2, 0, 1], [False, False, True])
    assert found.tokens == [[2, 3, 4], [2], [2]]


def test_one_copy_reaches_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever brings numbers to the host, it happens once, and its size is that of the tree."""
    copied: list[int] = []
    tolist = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        copied.append(tensor.numel())
        return tolist(tensor)

    tree, logits = random_tree(2, 8, 50), torch.randn(2, 8, 50)
    found = accept_op.accept(logits, tree.tokens, tree.parents.masked_fill(~tree.acceptable, -1))
    monkeypatch.setattr(match, "accept", lambda *operands: found)
    monkeypatch.setattr(match, "serves", lambda logits: True)
    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    batch = Batch([Row([1], 1, 99, SamplingParams(), PositionNoise(b, torch.arange(50))) for b in range(2)], 50)
    GreedyVerifier().accept(tree, logits, batch)
    assert copied == [2 * (3 + 8)]

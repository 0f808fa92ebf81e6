"""Acceptance policies on trees made by hand: what is walked, what never is, what a broken row does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from unit_rows import make_batch, make_row

from specdec.batch import Batch
from specdec.sampling import PositionNoise, SamplingParams, log_probs
from specdec.tree import PADDING, ROOT, TokenTree
from specdec.verifiers.base import Verdict, Verifier
from specdec.verifiers.match import CoupledVerifier, GreedyVerifier
from specdec.verifiers.rejection import RejectionConfig, RejectionVerifier
from specdec.verifiers.typical import TypicalConfig, TypicalVerifier

VOCAB = 6
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.0)
POLICIES: dict[str, tuple[Verifier, SamplingParams]] = {
    "greedy": (GreedyVerifier(), GREEDY),
    "coupled": (CoupledVerifier(), SAMPLED),
    "rejection": (RejectionVerifier(), SAMPLED),
    "typical": (TypicalVerifier(), SAMPLED),
}
every_policy = pytest.mark.parametrize(("verifier", "params"), POLICIES.values(), ids=POLICIES.keys())


def sure_of(tokens: list[list[int]]) -> Tensor:
    """``[B, N, V]`` logits that leave no doubt about the token after each node."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), VOCAB).float() * 200.0


def path_of(verdict: Verdict, row: int) -> list[int]:
    """The columns kept of a row."""
    columns: list[int] = verdict.path[row, : verdict.num_accepted[row] + 1].tolist()
    return columns


@every_policy
def test_each_row_of_a_batch_walks_its_own_tree(verifier: Verifier, params: SamplingParams) -> None:
    tree = TokenTree(
        torch.tensor([[0, 1, 2, 3, 4], [5, 1, 2, 0, 0], [4, 0, 3, 0, 2]]),
        torch.tensor([[ROOT, 0, 0, 2, 3], [ROOT, 0, 1, PADDING, PADDING], [ROOT, PADDING, 0, PADDING, 2]]),
    )
    logits = sure_of([[2, 0, 3, 4, 5], [3, 0, 0, 0, 0], [3, 0, 2, 0, 1]])

    verdict = verifier.accept(tree, logits, make_batch([[0], [1, 5], [2, 2, 4]], VOCAB, params))

    assert verdict.tokens == [[2, 3, 4, 5], [3], [3, 2, 1]]
    assert verdict.num_accepted == [3, 0, 2]
    assert [path_of(verdict, row) for row in range(3)] == [[0, 2, 3, 4], [0], [0, 2, 4]]
    assert verdict.failed == [False] * 3


@every_policy
@pytest.mark.parametrize("garbage", [-1, 0, 10**9], ids=["negative", "in the vocabulary", "beyond the vocabulary"])
def test_padding_and_virtual_nodes_are_never_accepted_whatever_they_hold(
    verifier: Verifier, params: SamplingParams, garbage: int
) -> None:
    tree = TokenTree(
        torch.tensor([[2, garbage, garbage, 1, 3]]),
        torch.tensor([[ROOT, 0, PADDING, 1, 0]]),
        virtual=torch.tensor([[False, True, False, False, False]]),
        embeddings=torch.zeros(1, 5, 4),
    )
    penalised = replace(params, repetition_penalty=1.0001)
    for settings in (params, penalised):
        verdict = verifier.accept(tree, sure_of([[0, 1, 0, 4, 5]]), make_batch([[2]], VOCAB, settings))
        assert (verdict.tokens, verdict.num_accepted) == ([[0]], [0])

        verdict = verifier.accept(tree, sure_of([[3, 1, 0, 4, 5]]), make_batch([[2]], VOCAB, settings))
        assert (verdict.tokens, path_of(verdict, 0)) == ([[3, 5]], [0, 4])


@every_policy
def test_child_of_a_virtual_node_is_not_reached(verifier: Verifier, params: SamplingParams) -> None:
    tree = TokenTree(
        torch.tensor([[2, 1, 1]]),
        torch.tensor([[ROOT, 0, 1]]),
        virtual=torch.tensor([[False, True, False]]),
        embeddings=torch.zeros(1, 3, 4),
    )

    verdict = verifier.accept(tree, sure_of([[1, 1, 1]]), make_batch([[2]], VOCAB, params))

    assert verdict.tokens == [[1]]


@every_policy
@pytest.mark.parametrize("column", [0, 1], ids=["at the root", "after an accepted node"])
def test_nan_fails_only_the_row_it_stands_in(verifier: Verifier, params: SamplingParams, column: int) -> None:
    tree = TokenTree(torch.tensor([[0, 1], [0, 1], [0, 1]]), torch.tensor([[ROOT, 0]] * 3))
    logits = sure_of([[1, 2]] * 3)
    logits[1, column, 3] = torch.nan

    verdict = verifier.accept(tree, logits, make_batch([[0]] * 3, VOCAB, params))

    assert verdict.failed == [False, True, False]
    before_the_nan = [1] * column  # what plain decoding would have emitted before it failed
    assert verdict.tokens == [[1, 2], before_the_nan, [1, 2]]


@every_policy
def test_failed_row_does_not_descend_to_a_child_that_holds_the_nan(verifier: Verifier, params: SamplingParams) -> None:
    tree = TokenTree(torch.tensor([[0, 1, 2]]), torch.tensor([[ROOT, 0, 1]]))
    logits = sure_of([[1, 2, 3]])
    logits[0, 0, 1] = torch.nan

    verdict = verifier.accept(tree, logits, make_batch([[0]], VOCAB, params))

    assert (verdict.failed, verdict.num_accepted) == ([True], [0])


@every_policy
def test_nan_at_a_node_that_is_not_visited_fails_nothing(verifier: Verifier, params: SamplingParams) -> None:
    tree = TokenTree(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[ROOT, 0, 0, 2]]))
    logits = sure_of([[1, 2, 0, 0]])
    logits[0, 2:] = torch.nan

    verdict = verifier.accept(tree, logits, make_batch([[0]], VOCAB, params))

    assert (verdict.tokens, verdict.failed) == ([[1, 2]], [False])


def chain_logits(seed: int, length: int) -> Tensor:
    """Mild random logits ``[length, V]``: a penalty changes what is likely."""
    return torch.randn(length, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", ["greedy", "coupled"])
def test_penalty_along_the_path_equals_one_token_at_a_time(seed: int, name: str) -> None:
    verifier, params = POLICIES[name]
    params = replace(params, repetition_penalty=2.5)
    noise = PositionNoise(seed, torch.arange(VOCAB))
    logits = chain_logits(seed, 4)

    tokens = [0]  # one token at a time: the batch sees all earlier ones
    for step in range(4):
        batch = Batch([make_row(tokens, VOCAB, params, noise=noise)], VOCAB)
        pass_ = verifier.accept(TokenTree.from_pending(batch.pending), logits[step].view(1, 1, -1), batch)
        tokens += pass_.tokens[0]
    chain = TokenTree(torch.tensor([tokens[:4]]), torch.tensor([[ROOT, 0, 1, 2]]))
    batch = Batch([make_row([0], VOCAB, params, noise=noise)], VOCAB)
    before = None if batch.seen is None else batch.seen.clone()

    verdict = verifier.accept(chain, logits.unsqueeze(0), batch)

    assert verdict.tokens == [tokens[1:]]
    assert batch.seen is not None
    assert before is not None
    assert torch.equal(batch.seen, before), "the batch must not change"


def test_penalty_in_a_batch_is_each_rows_own() -> None:
    params = replace(GREEDY, repetition_penalty=10.0)
    tree = TokenTree(torch.tensor([[0, 1], [5, 1]]), torch.tensor([[ROOT, 0]] * 2))
    after = torch.tensor([0.0, 3.0, 0.0, 2.0, 0.0, 0.0])  # 1 again, were it not penalised
    logits = torch.stack([after, after]).expand(2, -1, -1)

    verdict = GreedyVerifier().accept(tree, logits, make_batch([[0], [1, 5]], VOCAB, params))

    assert verdict.tokens == [[1, 3], [3]]


def test_first_of_equal_siblings_is_walked() -> None:
    tree = TokenTree(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[ROOT, 0, 0, 1]]))

    verdict = GreedyVerifier().accept(tree, sure_of([[1, 2, 5, 3]]), make_batch([[0]], VOCAB, GREEDY))

    assert (verdict.tokens, path_of(verdict, 0)) == ([[1, 2, 3]], [0, 1, 3])


def test_rejection_configuration_says_how_siblings_are_to_be_drawn() -> None:
    assert RejectionVerifier().siblings == "without_replacement"
    assert RejectionVerifier(RejectionConfig("with_replacement")).siblings == "with_replacement"


def test_only_typical_acceptance_is_marked_lossy() -> None:
    assert {name for name, (verifier, _) in POLICIES.items() if not verifier.lossless} == {"typical"}
    assert all(verifier.name == name for name, (verifier, _) in POLICIES.items())


HALVES = torch.tensor([0.5, 0.3, 0.1, 0.06, 0.04, 0.0], dtype=torch.float64)
"""Entropy 1.2118 nats, so delta 0.3 gives a threshold of 0.3 * 0.2977 = 0.0893, below epsilon 0.09."""


def typical(tree: TokenTree, probabilities: Tensor, config: TypicalConfig | None = None) -> Verdict:
    """Verdict of typical acceptance from the target's probabilities ``[N, V]``."""
    return TypicalVerifier(config).accept(tree, probabilities.log().unsqueeze(0), make_batch([[0]], VOCAB, SAMPLED))


@pytest.mark.parametrize(("token", "accepted"), [(0, 1), (1, 1), (2, 1), (3, 0), (4, 0), (5, 0)])
def test_typical_accepts_what_is_above_the_threshold_of_a_known_distribution(token: int, accepted: int) -> None:
    tree = TokenTree(torch.tensor([[0, token]]), torch.tensor([[ROOT, 0]]))

    assert typical(tree, HALVES.expand(2, -1)).num_accepted == [accepted]


def test_typical_threshold_is_the_smaller_of_epsilon_and_the_entropys_share() -> None:
    tree = TokenTree(torch.tensor([[0, 3]]), torch.tensor([[ROOT, 0]]))  # probability 0.06
    entropy = -sum(float(p) * math.log(p) for p in HALVES if p > 0)
    share = 0.06 / math.exp(-entropy)  # delta at which the threshold is 0.06

    def accepted(epsilon: float, delta: float) -> list[int]:
        return typical(tree, HALVES.expand(2, -1), TypicalConfig(epsilon, delta)).num_accepted

    assert accepted(epsilon=1.0, delta=share * 0.999) == [1]
    assert accepted(epsilon=1.0, delta=share * 1.001) == [0]
    assert accepted(epsilon=0.059, delta=1.0) == [1]
    assert accepted(epsilon=0.061, delta=1.0) == [0]


def test_typical_keeps_the_longest_path_even_where_a_shorter_one_is_more_probable() -> None:
    tree = TokenTree(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[ROOT, 0, 0, 2]]))

    assert path_of(typical(tree, HALVES.expand(4, -1)), 0) == [0, 2, 3]


@pytest.mark.parametrize("depth", [1, 2, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_typical_keeps_the_more_probable_of_equally_long_paths(depth: int, dtype: torch.dtype) -> None:
    probabilities = torch.tensor([0.499, 0.501, 0.0, 0.0, 0.0, 0.0], dtype=dtype)
    # Two chains of equal depth; the second differs in its first token, which is the likelier by a hair.
    parents = [ROOT, 0, 0, *range(1, 2 * depth - 1)]
    tokens = [0, 0, 1, *[0] * (2 * depth - 2)]
    tree = TokenTree(torch.tensor([tokens]), torch.tensor([parents]))

    assert path_of(typical(tree, probabilities.expand(len(tokens), -1)), 0) == [0, *range(2, 2 * depth + 1, 2)]


def test_typical_draws_the_bonus_with_the_noise_of_its_position() -> None:
    row = make_row([2, 0], VOCAB, seed=3)
    tree = TokenTree(torch.tensor([[0, 0]]), torch.tensor([[ROOT, 0]]))

    verdict = TypicalVerifier().accept(tree, HALVES.log().expand(1, 2, -1), Batch([row], VOCAB))

    assert verdict.tokens == [[0, int((HALVES.log() + row.noise.gumbel(3)).argmax())]]


def test_typical_applies_the_penalty_along_the_path() -> None:
    params = SamplingParams(temperature=1.0, repetition_penalty=8.0)
    logits = torch.tensor([0.0, 4.0, 3.5, 0.0, 0.0, 0.0], dtype=torch.float64)
    chain = TokenTree(torch.tensor([[0, 1, 1]]), torch.tensor([[ROOT, 0, 1]]))
    config = TypicalConfig(epsilon=0.5, delta=1.0)
    seen = torch.tensor([[True, True, False, False, False, False]])
    assert float(log_probs(logits.unsqueeze(0), params, seen)[0, 1].exp()) < 0.05  # at first 0.6

    verdict = TypicalVerifier(config).accept(chain, logits.expand(1, 3, -1), make_batch([[0]], VOCAB, params))

    assert verdict.num_accepted == [1]


@pytest.mark.parametrize("name", ["epsilon", "delta"])
@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan")])
def test_typical_thresholds_outside_their_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be in \(0, 1\]"):
        TypicalConfig(**{name: value})

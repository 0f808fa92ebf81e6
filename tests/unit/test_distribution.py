"""Lossless policies emit exactly the target's distribution, by enumeration of everything that can happen.

The rejection policy runs as it is, on noise that stands for random variables: comparing a uniform number with a ratio
is a branch of probability ``clamp(ratio, 0, 1)``, the argmax of log-probabilities plus Gumbel noise is a branch per
token. Drafts are branches too. All branches are taken, and their probabilities summed.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from unit_rows import SAMPLING, make_row

from specdec.batch import Batch, Row
from specdec.sampling import PositionNoise, SamplingParams, derive_seed, log_probs
from specdec.tree import PADDING, ROOT, SiblingSampling, TokenTree
from specdec.verifiers.base import Verifier
from specdec.verifiers.match import CoupledVerifier, GreedyVerifier
from specdec.verifiers.rejection import RejectionVerifier

T = TypeVar("T")
Context = tuple[int, ...]
Model = Callable[[Context], Tensor]

PENDING = 0
EXACT = 1e-12
"""Float64 rounding of a few hundred additions and products of numbers below 1 stays two orders below."""
SIGNIFICANCE = 1e-3
"""Chance that a correct generator fails a statistical test; seeds are fixed, so reruns agree."""


class Chance:
    """A sequence of random choices: the script first, then the first possible outcome of each."""

    def __init__(self, script: Sequence[int]) -> None:
        self.script = script
        self.taken: list[tuple[int, list[float]]] = []
        self.probability = 1.0

    def choose(self, weights: Sequence[float]) -> int:
        """Index of an outcome; ``weights`` are its probabilities."""
        step = len(self.taken)
        possible = [index for index, weight in enumerate(weights) if weight > 0]
        outcome = self.script[step] if step < len(self.script) else possible[0]
        self.taken.append((outcome, list(weights)))
        self.probability *= weights[outcome]
        return outcome

    def other_scripts(self) -> Iterator[list[int]]:
        """Scripts of what could have happened at the choices beyond this script."""
        for step in range(len(self.script), len(self.taken)):
            outcome, weights = self.taken[step]
            before = [taken for taken, _ in self.taken[:step]]
            for other in range(outcome + 1, len(weights)):
                if weights[other] > 0:
                    yield [*before, other]


def enumerate_outcomes(run: Callable[[Chance], T]) -> Iterator[tuple[T, float]]:
    """Every outcome of a random procedure with its probability."""
    scripts: list[list[int]] = [[]]
    while scripts:
        chance = Chance(scripts.pop())
        result = run(chance)
        yield result, chance.probability
        scripts.extend(chance.other_scripts())


class BranchingUniform:
    """A uniform random number in (0, 1) that is only ever compared."""

    def __init__(self, chance: Chance) -> None:
        self.chance = chance

    def __lt__(self, ratio: float) -> bool:
        below = min(max(ratio, 0.0), 1.0)
        return self.chance.choose([1.0 - below, below]) == 1


class BranchingGumbel:
    """Gumbel noise that is only ever added to log-probabilities, whose argmax is then taken."""

    def __init__(self, chance: Chance) -> None:
        self.chance = chance
        self.log_probs = torch.empty(0)

    def __radd__(self, log_probs: Tensor) -> BranchingGumbel:
        self.log_probs = log_probs
        return self

    def argmax(self) -> int:
        """A token, each with the probability the Gumbel-max trick gives it."""
        return self.chance.choose(self.log_probs.softmax(-1).tolist())


class BranchingNoise:
    """What a row's noise is to a policy; no random number may be used twice."""

    def __init__(self, chance: Chance) -> None:
        self.chance = chance
        self.used: set[tuple[int, ...]] = set()

    def _once(self, *key: int) -> None:
        assert key not in self.used, f"the number for {key} was used before"
        self.used.add(key)

    def uniform(self, position: int, draw: int) -> BranchingUniform:
        self._once(position, draw)
        return BranchingUniform(self.chance)

    def gumbel(self, position: int) -> BranchingGumbel:
        self._once(position)
        return BranchingGumbel(self.chance)


@dataclass(frozen=True)
class Models:
    """Raw logits of target and draft model, as functions of what follows the prompt; the prompt is ``PENDING``."""

    target: Model
    draft: Model
    vocab_size: int
    params: SamplingParams = SAMPLING

    def log_probs(self, model: Model, context: Context) -> Tensor:
        """Log-probabilities ``[V]`` after the sampling parameters."""
        seen = torch.zeros(1, self.vocab_size, dtype=torch.bool)
        seen[0, [PENDING, *context]] = True
        return log_probs(model(context).unsqueeze(0), self.params, seen)[0]

    def joint(self, length: int) -> dict[Context, float]:
        """The target's own probability of every continuation of some length."""
        law: dict[Context, float] = {(): 1.0}
        for _ in range(length):
            law = {
                (*context, token): mass * chance
                for context, mass in law.items()
                for token, chance in enumerate(self.log_probs(self.target, context).exp().tolist())
            }
        return law


Shape = Sequence[int]
"""Parent column of every node but the root."""


def draft_tree(
    models: Models, shape: Shape, siblings: SiblingSampling, draw: Callable[[list[float]], int], drawn_as: str = ""
) -> TokenTree:
    """A tree whose nodes are drawn from the draft model as a drafter does; padding where it has no token left."""
    contexts: list[Context] = [()]
    parents = [ROOT]
    used: dict[int, set[int]] = defaultdict(set)
    for parent in shape:
        weights = models.log_probs(models.draft, contexts[parent]).exp().tolist()
        if (drawn_as or siblings) == "without_replacement":
            weights = [0.0 if token in used[parent] else weight for token, weight in enumerate(weights)]
        possible = sum(weights) > 0 and (parent == 0 or parents[parent] != PADDING)
        token = draw([weight / sum(weights) for weight in weights]) if possible else 0
        parents.append(parent if possible else PADDING)
        used[parent].add(token)
        contexts.append((*contexts[parent], token))
    log_q = torch.stack([models.log_probs(models.draft, context) for context in contexts])
    return TokenTree(
        torch.tensor([[PENDING, *(context[-1] for context in contexts[1:])]]),
        torch.tensor([parents]),
        draft_log_probs=log_q.unsqueeze(0),
        siblings=siblings,
    )


def contexts_of(tree: TokenTree, row: int = 0) -> list[Context]:
    """What follows the prompt at every node."""
    tokens = tree.tokens[row].tolist()
    contexts: list[Context] = []
    for column, parent in enumerate(tree.parents[row].tolist()):
        contexts.append((*contexts[parent], tokens[column]) if parent >= 0 else ())
    return contexts


def accept_one(verifier: Verifier, tree: TokenTree, models: Models, noise: Any) -> Context:
    """Tokens a policy emits for a one-row tree."""
    logits = torch.stack([models.target(context) for context in contexts_of(tree)]).unsqueeze(0)
    row = make_row([PENDING], models.vocab_size, models.params, noise=noise)
    return tuple(verifier.accept(tree, logits, Batch([row], models.vocab_size)).tokens[0])


def emitted_law(models: Models, make_tree: Callable[[Chance], TokenTree], length: int) -> dict[Context, float]:
    """Exact law of the first ``length`` tokens; where one pass emits fewer, the target itself goes on."""

    def run(chance: Chance) -> Context:
        return accept_one(RejectionVerifier(), make_tree(chance), models, BranchingNoise(chance))

    law: dict[Context, float] = defaultdict(float)
    for tokens, probability in enumerate_outcomes(run):
        rest: list[tuple[Context, float]] = [(tokens[:length], probability)]
        for _ in range(length - len(tokens)):
            rest = [
                ((*context, token), mass * chance)
                for context, mass in rest
                for token, chance in enumerate(models.log_probs(models.target, context).exp().tolist())
            ]
        for context, mass in rest:
            law[context] += mass
    return law


def largest_difference(left: dict[Context, float], right: dict[Context, float]) -> float:
    """Largest difference in probability over all sequences."""
    return max(abs(left.get(key, 0.0) - right.get(key, 0.0)) for key in left.keys() | right.keys())


def random_model(seed: int, vocab_size: int, zeros: float = 0.0, scale: float = 1.5) -> Model:
    """Random logits per context, a share of them -inf."""

    @cache
    def logits(context: Context) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 7919 * hash_context(context, vocab_size))
        values = scale * torch.randn(vocab_size, generator=generator, dtype=torch.float64)
        gone = torch.rand(vocab_size, generator=generator) < zeros
        gone[int(torch.randint(vocab_size, (1,), generator=generator))] = False  # something must be possible
        return values.masked_fill(gone, -torch.inf)

    return logits


def hash_context(context: Context, vocab_size: int) -> int:
    """A number per context."""
    return sum((token + 1) * (vocab_size + 1) ** place for place, token in enumerate(context))


def one_hot(model: Model) -> Model:
    """All mass on the model's best token."""

    def logits(context: Context) -> Tensor:
        values = model(context)
        return torch.full_like(values, -torch.inf).index_fill_(0, values.argmax(), 0.0)

    return logits


def swap(model: Model) -> Model:
    """The model with its tokens in reverse order: as far from it as can be."""
    return lambda context: model(context).flip(-1)


# Chosen so that p > q for two tokens of four at every context: a residual of one token would hide wrong siblings.
BASE, OTHER = random_model(1, 4), random_model(7, 4)
PAIRS = {
    "different": Models(BASE, OTHER, 4),
    "equal": Models(BASE, BASE, 4),
    "opposite": Models(BASE, swap(BASE), 4),
    "zeros in p": Models(random_model(3, 4, zeros=0.5), OTHER, 4),
    "zeros in q": Models(BASE, random_model(4, 4, zeros=0.5), 4),
    "zeros in both": Models(random_model(5, 4, zeros=0.4), random_model(6, 4, zeros=0.4), 4),
    "one-hot p": Models(one_hot(BASE), OTHER, 4),
    "one-hot q": Models(BASE, one_hot(OTHER), 4),
    "one-hot both": Models(one_hot(BASE), one_hot(OTHER), 4),
    "filtered": Models(BASE, OTHER, 4, SamplingParams(temperature=0.7, top_k=3, top_p=0.9, repetition_penalty=1.6)),
}
CHAIN, TWINS, TRIPLETS, BROAD = (0, 1), (0, 0), (0, 0, 0), (0, 0, 1)


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("siblings", ["with_replacement", "without_replacement"])
def test_rejection_of_a_chain_emits_the_targets_joint_law(pair: Models, siblings: SiblingSampling) -> None:
    law = emitted_law(pair, lambda chance: draft_tree(pair, CHAIN, siblings, chance.choose), length=3)

    assert largest_difference(law, pair.joint(3)) < EXACT


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("shape", [TWINS, TRIPLETS, BROAD], ids=["twins", "triplets", "broad"])
def test_rejection_with_replacement_emits_the_targets_joint_law(pair: Models, shape: Shape) -> None:
    law = emitted_law(pair, lambda chance: draft_tree(pair, shape, "with_replacement", chance.choose), length=2)

    assert largest_difference(law, pair.joint(2)) < EXACT


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize("shape", [TWINS, TRIPLETS, BROAD], ids=["twins", "triplets", "broad"])
def test_rejection_without_replacement_emits_the_targets_joint_law(pair: Models, shape: Shape) -> None:
    law = emitted_law(pair, lambda chance: draft_tree(pair, shape, "without_replacement", chance.choose), length=2)

    assert largest_difference(law, pair.joint(2)) < EXACT


def test_rejection_stays_exact_when_all_of_the_draft_distribution_was_drawn_as_siblings() -> None:
    def two_tokens(context: Context) -> Tensor:
        return OTHER(context).index_fill(0, torch.tensor([1, 2]), -torch.inf)

    pair = Models(BASE, two_tokens, 4)

    law = emitted_law(pair, lambda chance: draft_tree(pair, TWINS, "without_replacement", chance.choose), length=2)

    assert largest_difference(law, pair.joint(2)) < EXACT


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
@pytest.mark.parametrize(
    ("tokens", "parents"),
    [
        ([1], [0]),
        ([1, 2], [0, 1]),
        ([2, 1, 3], [0, 0, 0]),
        ([3, 3, 1], [0, 0, 0]),
        ([0, 1, 2, 3], [0, 0, 0, 0]),
        ([2, 2, 1, 3, 0], [0, 0, 1, 2, 1]),
    ],
    ids=["one", "chain", "siblings", "duplicates", "whole vocabulary", "duplicates with children"],
)
def test_rejection_of_ranked_candidates_emits_the_targets_joint_law(
    pair: Models, tokens: list[int], parents: list[int]
) -> None:
    tree = TokenTree(torch.tensor([[PENDING, *tokens]]), torch.tensor([[ROOT, *parents]]))

    law = emitted_law(pair, lambda _chance: tree, length=3)

    assert largest_difference(law, pair.joint(3)) < EXACT


@pytest.mark.parametrize(
    ("declared", "drawn"),
    [("without_replacement", "with_replacement"), ("with_replacement", "without_replacement")],
)
def test_a_wrong_declaration_of_how_siblings_were_drawn_is_visible_in_the_law(
    declared: SiblingSampling, drawn: str
) -> None:
    pair = PAIRS["different"]

    law = emitted_law(pair, lambda chance: draft_tree(pair, TRIPLETS, declared, chance.choose, drawn), length=1)

    assert largest_difference(law, pair.joint(1)) > 1e-3


def test_rejection_accepts_all_of_a_chain_drawn_from_the_target_itself() -> None:
    pair = PAIRS["equal"]

    def run(chance: Chance) -> Context:
        tree = draft_tree(pair, CHAIN, "with_replacement", chance.choose)
        return accept_one(RejectionVerifier(), tree, pair, BranchingNoise(chance))

    short = sum(chance for tokens, chance in enumerate_outcomes(run) if len(tokens) < 3)

    assert short < EXACT


def random_tree(generator: torch.Generator, vocab_size: int, num_nodes: int) -> TokenTree:
    """A random one-row tree; siblings may be equal."""
    parents = [int(torch.randint(column, (1,), generator=generator)) for column in range(1, num_nodes)]
    tokens = torch.randint(vocab_size, (1, num_nodes), generator=generator)
    tokens[0, 0] = PENDING
    return TokenTree(tokens, torch.tensor([[ROOT, *parents]]))


def plain_decoding(verifier: Verifier, models: Models, noise: Any, length: int) -> Context:
    """The text without speculation."""
    context: Context = ()
    while len(context) < length:
        tree = TokenTree.from_pending(torch.tensor([[PENDING, *context][-1]]))
        row = make_row([PENDING, *context], models.vocab_size, models.params, noise=noise)
        batch = Batch([row], models.vocab_size)
        context += tuple(verifier.accept(tree, models.target(context).view(1, 1, -1), batch).tokens[0])
    return context


def tied(model: Model) -> Model:
    """Logits rounded so coarsely that most maxima are shared."""
    return lambda context: model(context).clamp(-1, 1).round()


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), num_nodes=st.integers(1, 12), vocab_size=st.integers(2, 6), ties=st.booleans())
def test_greedy_emits_the_targets_most_probable_text_for_any_tree(
    seed: int, num_nodes: int, vocab_size: int, ties: bool
) -> None:
    model = random_model(seed, vocab_size)
    models = Models(tied(model) if ties else model, model, vocab_size, SamplingParams(temperature=0.0))
    tree = random_tree(torch.Generator().manual_seed(seed), vocab_size, num_nodes)

    tokens = accept_one(GreedyVerifier(), tree, models, noise=None)

    expected: Context = ()
    for _ in tokens:
        expected += (int(models.target(expected).argmax()),)
    assert tokens == expected
    held = contexts_of(tree)
    assert tokens[:-1] in held
    if len(set(held)) == len(held):  # of equal siblings the first is taken, whatever hangs on the others
        assert tokens not in held, "the walk stopped although a child held its choice"


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), num_nodes=st.integers(1, 12), vocab_size=st.integers(2, 6))
def test_coupled_choices_depend_on_position_and_context_but_not_on_the_tree(
    seed: int, num_nodes: int, vocab_size: int
) -> None:
    params = SamplingParams(temperature=0.8, top_p=0.95, repetition_penalty=1.3)
    models = Models(random_model(seed, vocab_size), random_model(seed, vocab_size), vocab_size, params)
    noise = PositionNoise(seed, torch.arange(vocab_size))
    tree = random_tree(torch.Generator().manual_seed(seed), vocab_size, num_nodes)

    tokens = accept_one(CoupledVerifier(), tree, models, noise)

    expected: Context = ()
    for _ in tokens:  # the token after the pending one stands at position 1
        expected += (int((models.log_probs(models.target, expected) + noise.gumbel(1 + len(expected))).argmax()),)
    assert tokens == expected
    assert tokens == plain_decoding(CoupledVerifier(), models, noise, len(tokens))
    held = contexts_of(tree)
    assert tokens[:-1] in held
    if len(set(held)) == len(held):  # of equal siblings the first is taken, whatever hangs on the others
        assert tokens not in held, "the walk stopped although a child held its choice"


def assert_law(counts: Tensor, probabilities: Tensor) -> None:
    """Pearson's chi-square test; impossible outcomes must not occur."""
    assert int(counts[probabilities == 0].sum()) == 0
    possible = probabilities > 0
    expected = probabilities[possible] * counts.sum()
    assert float(expected.min()) >= 5, "too few draws for the test to hold"
    assert stats.chisquare(counts[possible].numpy(), expected.numpy()).pvalue > SIGNIFICANCE


def test_coupled_pairs_of_tokens_follow_the_targets_joint_law() -> None:
    vocab_size, seeds, positions = 5, 20, 800
    models = Models(random_model(11, vocab_size, zeros=0.2, scale=0.7), BASE, vocab_size)
    tree = TokenTree(torch.tensor([[PENDING, 1, 3, 3]]), torch.tensor([[ROOT, 0, 0, 2]]))
    logits = torch.stack([models.target(context) for context in contexts_of(tree)])
    counts = torch.zeros(vocab_size, vocab_size, dtype=torch.int64)
    verifier = CoupledVerifier()
    for seed in range(seeds):
        noise = PositionNoise(derive_seed(seed, 0), torch.arange(vocab_size))
        # Every other position, so that no two rows share a random number.
        rows = [make_row([PENDING] * (1 + 2 * place), vocab_size, noise=noise) for place in range(positions // 2)]
        wide = TokenTree(tree.tokens.expand(len(rows), -1), tree.parents.expand(len(rows), -1))
        verdict = verifier.accept(wide, logits.expand(len(rows), -1, -1), Batch(rows, vocab_size))
        short = [index for index, tokens in enumerate(verdict.tokens) if len(tokens) == 1]
        after = [replace(rows[index], tokens=rows[index].tokens + verdict.tokens[index]) for index in short]
        second = torch.stack([models.target((row.tokens[-1],)) for row in after]).unsqueeze(1)
        batch = Batch(after, vocab_size)
        ends = verifier.accept(TokenTree.from_pending(batch.pending), second, batch).tokens
        texts = list(verdict.tokens)
        for index, end in zip(short, ends, strict=True):
            texts[index] = texts[index] + end
        for first, follower, *_ in texts:
            counts[first, follower] += 1

    assert int(counts.sum()) == seeds * positions // 2
    assert_law(
        counts.flatten(), torch.tensor([models.joint(2)[pair] for pair in itertools.product(range(5), repeat=2)])
    )


def test_coupled_single_tokens_follow_the_target_over_positions_and_seeds() -> None:
    vocab_size, seeds, positions = 8, 20, 1000
    logits = random_model(12, vocab_size)(())
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for seed in range(seeds):
        noise = PositionNoise(derive_seed(seed, 1), torch.arange(vocab_size))
        rows: list[Row] = [make_row([PENDING] * (1 + place), vocab_size, noise=noise) for place in range(positions)]
        batch = Batch(rows, vocab_size)
        verdict = CoupledVerifier().accept(
            TokenTree.from_pending(batch.pending), logits.expand(positions, 1, -1), batch
        )
        counts += torch.bincount(torch.tensor(verdict.tokens).flatten(), minlength=vocab_size)

    assert int(counts.sum()) == seeds * positions
    assert_law(counts, logits.softmax(-1))


def test_rejection_on_real_noise_follows_the_target() -> None:
    pair = PAIRS["different"]
    counts = torch.zeros(4, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    for seed in range(1000):
        noise = PositionNoise(derive_seed(seed, 2), torch.arange(4))

        def draw(weights: list[float]) -> int:
            return int(torch.multinomial(torch.tensor(weights), 1, generator=generator))

        tree = draft_tree(pair, TWINS, "without_replacement", draw)
        counts[accept_one(RejectionVerifier(), tree, pair, noise)[0]] += 1

    assert_law(counts, pair.log_probs(pair.target, ()).exp())


WIDTH = 4096
INDEX = torch.arange(WIDTH)


def uniforms(gumbel: Tensor) -> np.ndarray[Any, Any]:
    """The uniform numbers behind Gumbel noise."""
    return torch.exp(-torch.exp(-gumbel.double())).numpy()


STREAMS: dict[str, Callable[[PositionNoise, int], np.ndarray[Any, Any]]] = {
    "gumbel": lambda noise, position: uniforms(noise.gumbel(position)),
    "draft_gumbel 0": lambda noise, position: uniforms(noise.draft_gumbel(position, 0)),
    "draft_gumbel 3": lambda noise, position: uniforms(noise.draft_gumbel(position, 3)),
}


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS.keys())
def test_noise_of_each_stream_is_uniform_over_tokens_and_positions(
    stream: Callable[[PositionNoise, int], np.ndarray[Any, Any]],
) -> None:
    for seed in (0, 1, 2**64 - 1):
        noise = PositionNoise(seed, INDEX)
        values = np.stack([stream(noise, position) for position in range(16)])

        assert stats.kstest(values.ravel(), "uniform").pvalue > SIGNIFICANCE
        assert stats.kstest(values[:, 0], "uniform").pvalue > SIGNIFICANCE  # one token over positions


def test_decision_numbers_are_uniform_over_positions_and_draws_and_never_0_or_1() -> None:
    noise = PositionNoise(5, INDEX)
    values = np.array([[noise.uniform(position, draw) for draw in range(8)] for position in range(500)])

    assert values.min() > 0
    assert values.max() < 1
    assert stats.kstest(values.ravel(), "uniform").pvalue > SIGNIFICANCE
    assert stats.kstest(values[:, 7], "uniform").pvalue > SIGNIFICANCE


def assert_independent(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> None:
    """Chi-square test of a joint 8 x 8 histogram of two uniform sequences."""
    table, _, _ = np.histogram2d(left, right, bins=8, range=[[0, 1], [0, 1]])
    assert stats.chisquare(table.ravel()).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("distance", [1, 2, 1000])
def test_noise_at_different_positions_is_independent(distance: int) -> None:
    noise = PositionNoise(7, INDEX)

    assert_independent(uniforms(noise.gumbel(10)), uniforms(noise.gumbel(10 + distance)))


@pytest.mark.parametrize(("left", "right"), [(0, 1), (1, 2), (0, 2**32), (3, 3 + 2**63)])
def test_noise_of_different_seeds_is_independent(left: int, right: int) -> None:
    assert_independent(uniforms(PositionNoise(left, INDEX).gumbel(4)), uniforms(PositionNoise(right, INDEX).gumbel(4)))


def test_noise_of_neighbouring_tokens_is_independent() -> None:
    values = uniforms(PositionNoise(8, INDEX).gumbel(3))

    assert_independent(values[:-1], values[1:])


@pytest.mark.parametrize(("left", "right"), list(itertools.combinations(STREAMS, 2)))
def test_streams_of_a_position_are_independent(left: str, right: str) -> None:
    noise = PositionNoise(9, INDEX)

    assert_independent(STREAMS[left](noise, 2), STREAMS[right](noise, 2))


def test_decision_numbers_are_independent_of_the_bonus_and_draft_noise() -> None:
    noise = PositionNoise(10, torch.arange(2))
    positions = range(2048)
    decisions = np.array([noise.uniform(position, 0) for position in positions])

    assert_independent(decisions, np.array([noise.uniform(position, 1) for position in positions]))
    assert_independent(decisions, np.array([uniforms(noise.gumbel(position))[0] for position in positions]))
    assert_independent(decisions, np.array([uniforms(noise.draft_gumbel(position, 0))[0] for position in positions]))


def test_noise_is_the_same_whatever_was_asked_before_and_after_it_is_forgotten() -> None:
    first, second = PositionNoise(3, torch.arange(50)), PositionNoise(3, torch.arange(50))
    forward = [first.gumbel(position).clone() for position in range(6)]
    decision = first.uniform(4, 2)
    second.draft_gumbel(4, 0)
    backward = [second.gumbel(position).clone() for position in reversed(range(6))][::-1]

    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert second.uniform(4, 2) == decision
    first.forget_before(4)
    assert all(torch.equal(first.gumbel(position), forward[position]) for position in range(6))


def test_forgetting_drops_settled_positions_and_keeps_the_rest() -> None:
    noise = PositionNoise(3, torch.arange(50))
    kept = {position: noise.gumbel(position) for position in range(6)}

    noise.forget_before(4)

    assert [noise.gumbel(position) is kept[position] for position in range(6)] == [False] * 4 + [True] * 2


def test_a_tokens_noise_does_not_depend_on_the_size_of_the_vocabulary() -> None:
    assert torch.equal(
        PositionNoise(3, torch.arange(10)).gumbel(5), PositionNoise(3, torch.arange(1000)).gumbel(5)[:10]
    )


def test_seeds_of_completions_are_reproducible_distinct_and_fresh_without_a_seed() -> None:
    seeds = {derive_seed(seed, index) for seed in range(50) for index in range(50)}

    assert len(seeds) == 2500
    assert derive_seed(7, 3) == derive_seed(7, 3)
    assert derive_seed(None, 0) != derive_seed(None, 0)
    assert all(0 <= seed < 2**64 for seed in seeds)

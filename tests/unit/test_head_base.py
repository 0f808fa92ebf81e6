"""What drafters that follow the target's states have in common: what they are handed, their budget, their layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from integration.architectures import VOCAB, tiny_model
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from unit_heads import WIDTH, random_weights
from unit_rows import make_batch

from specdec.attention import AttentionPass
from specdec.drafters import clover, heads
from specdec.drafters.clover import CloverConfig, CloverDrafter
from specdec.drafters.heads import HeadConfig, HeadDrafter, make_vocabulary
from specdec.drafters.layer import CachedAttention, DraftLayer, LayerShape, causal_attention
from specdec.drafters.medusa import MedusaConfig, MedusaDrafter, MedusaHeads
from specdec.drafters.weights import DrafterWeights
from specdec.kv_cache import KVCache
from specdec.optimal_tree import OptimalTrees
from specdec.sampling import SamplingParams
from specdec.target import HFTarget, TargetOutput
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny_model())


@pytest.fixture(scope="module")
def exact() -> HFTarget:
    """In float64, so that another order of sums is all that may differ."""
    return HFTarget(tiny_model().double())


class Recorder(HeadDrafter):
    """What the base class hands to its subclasses."""

    name = "medusa"

    def make_module(self, shape: Any) -> MedusaHeads:
        return MedusaHeads(**shape)

    def begin(self, batch_size: int) -> None:
        self.seen: list[tuple[list[list[int]], list[list[float]]]] = []

    def absorb(self, features: Any, tokens: Tensor, counts: Sequence[int]) -> None:
        states = features["last"][..., 0]
        rows = [(tokens[row, :count].tolist(), states[row, :count].tolist()) for row, count in enumerate(counts)]
        self.seen.append(([row[0] for row in rows], [row[1] for row in rows]))

    def logits(self, tree: TokenTree, first: int, level: int) -> Tensor:
        return torch.arange(float(VOCAB)).expand(tree.batch_size, 1, -1)

    def keep_rows(self, rows: Tensor) -> None:
        self.kept = rows.tolist()


def recorder(target: HFTarget, **options: Any) -> Recorder:
    drafter = Recorder(HeadConfig(**options), random_weights(target, "medusa", 0, 1))
    drafter.bind(target, None)
    drafter.begin(0)
    return drafter


def test_prompt_states_come_with_the_token_that_follows_each(target: HFTarget) -> None:
    drafter = recorder(target)
    batch = make_batch([[1, 2, 3, 4], [5], [6, 7]], VOCAB)
    states = torch.arange(9.0).view(3, 3, 1)
    drafter.start(batch, TargetOutput(torch.empty(0), {"last": states}))

    assert drafter.seen == [([[2, 3, 4], [], [7]], [[0.0, 1.0, 2.0], [], [6.0]])]


def test_accepted_states_come_with_the_token_that_follows_each(target: HFTarget) -> None:
    drafter = recorder(target)
    batch = make_batch([[1], [2], [3]], VOCAB)
    tree = TokenTree.from_pending(batch.pending)
    states = torch.arange(15.0).view(3, 5, 1)
    path = torch.tensor([[0, 2, 4], [0, 0, 0], [0, 3, 3]])
    verdict = Verdict(path, [2, 0, 1], [[7, 8, 9], [4], [6]], [False, False, True])
    drafter.observe(batch, tree, TargetOutput(torch.empty(0), {"last": states}), verdict)

    assert drafter.seen == [([[7, 8, 9], [4], [6, 0]], [[0.0, 2.0, 4.0], [5.0], [10.0, 13.0]])]


def test_rows_are_kept_in_the_order_given(target: HFTarget) -> None:
    drafter = recorder(target)
    drafter.keep(make_batch([[1], [2], [3]], VOCAB), [2, 0])
    assert drafter.kept == [2, 0]


@pytest.mark.parametrize(
    ("options", "room", "nodes", "depth"),
    [
        ({"depth": 3, "max_nodes": 9}, 99, 9, 3),
        ({"depth": 3, "max_nodes": 9}, 2, 9, 1),
        ({"max_nodes": 1}, 99, 1, 0),
        ({}, 1, 1, 0),
        ({"depth": 4, "width": 1, "branching": 1}, 99, 5, 4),
    ],
)
def test_drafts_keep_to_budget_depth_and_what_can_still_be_emitted(
    target: HFTarget, options: dict[str, Any], room: int, nodes: int, depth: int
) -> None:
    drafter = recorder(target, **options)
    batch = make_batch([[1, 2]], VOCAB, SamplingParams())
    batch.rows[0].max_len = 2 + room
    tree = drafter.propose(batch)

    tree.validate(VOCAB)
    assert tree.num_nodes <= nodes
    assert int(tree.draft_depth.max()) <= depth
    assert (tree.num_nodes > 1) == (depth > 0)


def test_chains_of_single_nodes_do_not_repeat_what_is_penalised(target: HFTarget) -> None:
    drafter = recorder(target, depth=3, width=1, branching=1)
    tree = drafter.propose(make_batch([[1, VOCAB - 2]], VOCAB, SamplingParams(repetition_penalty=2.0)))

    assert tree.tokens[0].tolist() == [VOCAB - 2, VOCAB - 1, VOCAB - 3, VOCAB - 4]


def test_calibrated_trees_go_by_rank_and_depth(target: HFTarget) -> None:
    weights = random_weights(target, "medusa", 0, 1)
    rates = [[0.6, 0.5, 0.01], [0.9, 0.01, 0.01]]
    weights = DrafterWeights(weights.drafter, weights.target, weights.shape, weights.tensors, hit_rates=rates)
    drafter = Recorder(HeadConfig(tree="calibrated", depth=2, max_nodes=5, branching=4), weights)
    drafter.bind(target, None)
    drafter.begin(1)
    tree = drafter.propose(make_batch([[1, 2]], VOCAB, SamplingParams()))

    best, second = VOCAB - 1, VOCAB - 2
    assert tree.tokens[0, 1:].tolist() == [best, best, second, best]  # 0.6, 0.54, 0.5, 0.45
    assert tree.parents[0].tolist() == [-1, 0, 1, 0, 3]


@pytest.mark.parametrize("max_nodes", [2, 8, 23])
@pytest.mark.parametrize("rates", [[[0.4, 0.3, 0.2]] * 3, [[0.3, 0.3, 0.3], [0.9, 0.05, 0.04], [0.5, 0.2, 0.1]]])
def test_calibrated_trees_are_sequoias_best(target: HFTarget, rates: list[list[float]], max_nodes: int) -> None:
    weights = random_weights(target, "medusa", 0, 1)
    weights = DrafterWeights(weights.drafter, weights.target, weights.shape, weights.tensors, hit_rates=rates)
    config = HeadConfig(tree="calibrated", depth=3, max_nodes=max_nodes, branching=3, width=1)
    drafter = Recorder(config, weights)
    drafter.bind(target, None)
    drafter.begin(1)
    tree = drafter.propose(make_batch([[1, 2]], VOCAB, SamplingParams()))

    best = OptimalTrees(rates, max_nodes, 3).best(max_nodes, 3)
    assert tree.num_nodes == max_nodes == len(best.parents)
    assert tree.confidence is not None
    assert float(tree.confidence.sum()) == pytest.approx(best.tokens)  # chances that nodes are accepted, the root's 1
    assert drafter.expected_accepted([1, max_nodes, 512]) == pytest.approx([0.0, *[best.tokens - 1.0] * 2])


def test_without_calibration_nothing_is_expected(target: HFTarget) -> None:
    drafter = Recorder(HeadConfig(), random_weights(target, "medusa", 0, 1))
    drafter.bind(target, None)
    assert drafter.expected_accepted([1, 2]) is None


@pytest.mark.parametrize("option", ["depth", "width", "branching", "max_nodes"])
def test_impossible_options_are_refused_with_their_value(option: str) -> None:
    for config in (MedusaConfig, CloverConfig):
        with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
            config(**{option: 0})


def test_reduced_vocabulary_holds_the_most_frequent_tokens_and_the_end_of_sequence() -> None:
    counts = torch.tensor([0, 5, 1, 9, 9, 0, 2])

    assert make_vocabulary(counts, 3).tolist() == [1, 3, 4]
    assert make_vocabulary(counts, 3, always=[5]).tolist() == [3, 4, 5]
    assert make_vocabulary(counts, 1).tolist() == [3]


@pytest.mark.parametrize("tied", [False, True])
def test_clover_reads_the_output_embeddings(tied: bool) -> None:
    target = HFTarget(tiny_model(tie_word_embeddings=tied))
    table = clover.output_table(target)

    assert table.data_ptr() == target.model.get_output_embeddings().weight.data_ptr()


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"head_dim": 24}])
def test_draft_layer_is_a_layer_of_llama(changes: dict[str, int]) -> None:
    target = HFTarget(tiny_model(**changes).double())
    layer = DraftLayer(LayerShape.of(target)).double()
    theirs: LlamaDecoderLayer = target.model.model.layers[1]
    names = {name.rpartition(".")[0].rpartition(".")[2]: value for name, value in theirs.named_parameters()}
    layer.load_state_dict({f"{name}.weight": names[name] for name, _ in layer.named_children()})
    hidden, positions = torch.randn(2, 9, WIDTH, dtype=torch.float64), torch.arange(9).expand(2, -1) + 5

    angles = LlamaRotaryEmbedding(target.config)(hidden, positions)
    causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, -1, -1)
    expected = theirs(hidden, attention_mask=causal, position_ids=positions, position_embeddings=angles)
    expected = expected[0] if isinstance(expected, tuple) else expected
    got = layer(theirs.input_layernorm(hidden), hidden, positions, causal_attention)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)  # the angles are float32


def test_draft_layer_attends_to_its_cache_as_to_the_text(exact: HFTarget) -> None:
    layer = DraftLayer(LayerShape.of(exact)).double()
    hidden = torch.randn(1, 9, WIDTH, dtype=torch.float64)
    expected = layer(hidden, hidden, torch.arange(9).unsqueeze(0), causal_attention)
    cache, parts = KVCache(1, 9), []
    for start, end in ((0, 4), (4, 5), (5, 9)):
        size = end - start
        causal = torch.ones(size, size, dtype=torch.bool).tril().unsqueeze(0)
        shared = AttentionPass(cache, torch.arange(size).unsqueeze(0), causal)
        part = hidden[:, start:end]
        parts.append(layer(part, part, shared.positions, CachedAttention(shared, 0)))
        cache.advance([size])
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["medusa", "clover"])
@pytest.mark.parametrize("vocab_size", [0, 60])
def test_drafting_in_bfloat16_is_as_exact_as_the_plain_layers_are(name: str, vocab_size: int) -> None:
    """Layers are packed where the CPU has kernels for it: twice the error of plain ones at most, against float32."""
    rounded = HFTarget(tiny_model().bfloat16())
    wide = HFTarget(tiny_model().bfloat16().float())
    weights = random_weights(rounded, name, vocab_size, 1)
    weights.tensors.update({k: v.bfloat16() for k, v in weights.tensors.items() if v.is_floating_point()})
    features = {key: torch.randn(1, 5, WIDTH).bfloat16() for key in ("last", "pre_norm")}
    tokens, tree = torch.randint(VOCAB, (1, 5)), TokenTree(torch.tensor([[5, 6, 7]]), torch.tensor([[-1, 0, 0]]))

    @torch.no_grad()
    def drafted(target: HFTarget, plain: bool = False) -> Tensor:
        drafter: Any = (MedusaDrafter if name == "medusa" else CloverDrafter)(weights=weights)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heads, "panels_run", lambda: False)  # a head in 8 bit is not meant to be exact
            if plain:
                patch.setattr(heads, "can_pack", lambda _: False)
            drafter.bind(target, None)
        drafter.begin(1)
        drafter.absorb({key: value.to(target.dtype) for key, value in features.items()}, tokens, [5])
        first = drafter.logits(TokenTree.from_pending(tree.tokens[:, 0]), 0, 1)
        return torch.cat([first, drafter.logits(tree, 1, 2)], dim=1).float()

    exact, plain, packed = drafted(wide), drafted(rounded, plain=True), drafted(rounded)
    assert float((packed - exact).norm()) <= 2 * float((plain - exact).norm())
    assert float((packed - exact).norm()) < 0.1 * float(exact.norm())

"""Compiled drafting: the tree, and the states it starts from, are those of the same steps one by one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.architectures import VOCAB, tiny_model
from unit_rows import make_batch

from specdec.batch import Batch
from specdec.drafters.eagle import EagleConfig, EagleDrafter, make_eagle
from specdec.drafters.layer import LayerShape
from specdec.drafters.layer_parallel import LayerParallelConfig, LayerParallelDrafter
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.drafters.pruned import PrunedLayers, build_pruned
from specdec.drafters.weights import DrafterWeights, TargetFacts, save_weights
from specdec.kernels.decoder_layer import MOST_TOP
from specdec.lean_stack import make_lean
from specdec.packing import pack_linears
from specdec.sampling import SamplingParams
from specdec.target import HFTarget
from specdec.tree import TokenTree

STATES = ("pre_norm", 1, 2)
FORMS: dict[str, dict[str, Any]] = {
    "ours": {"vocab_size": 60},
    "ours, whole vocabulary": {},
    "EAGLE-3": {"vocab_size": 60, "scaled": False, "mixed": False, "own_output": True, "norm_before_residual": True},
    "to the state itself": {"mixed": False},
}
GREEDY = SamplingParams()
SIZES = [(1, 4, 8, 24), (5, 4, 8, 24), (4, 8, 12, 60), (6, 2, 3, 5), (3, 1, 1, 64), (4, 9, 64, 64)]
"""Depth, width, branching, most nodes."""


def make_drafter(target: HFTarget, form: str, config: EagleConfig) -> EagleDrafter:
    torch.manual_seed(1)
    shape = {"layer": asdict(LayerShape.of(target)), "states": STATES, **FORMS[form]}
    module = make_eagle(shape)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    if module.vocabulary is not None:
        module.vocabulary.copy_(torch.randperm(VOCAB)[:60].sort().values)
    rates = [[0.5, 0.2, 0.1], [0.4, 0.15, 0.05]]
    weights = DrafterWeights("eagle", TargetFacts.of(target), shape, module.state_dict(), hit_rates=rates)
    drafter = EagleDrafter(config, weights)
    drafter.bind(target, None)
    return drafter


@pytest.fixture(scope="module")
def target() -> HFTarget:
    torch.manual_seed(0)
    return HFTarget(tiny_model(head_dim=32, initializer_range=0.15).bfloat16())


@pytest.fixture(autouse=True)
def _kernels(target: HFTarget) -> None:
    if make_drafter(target, "ours", EagleConfig())._compiled is None:
        pytest.skip("this CPU has no compiled products")


def greedy(*rows: list[int], params: SamplingParams = GREEDY) -> Batch:
    return make_batch(rows, VOCAB, params)


def in_steps(drafter: EagleDrafter) -> EagleDrafter:
    """The same drafter without compiled calls."""
    drafter._compiled = None
    return drafter


def absorb(drafter: EagleDrafter, target: HFTarget, pieces: list[list[int]]) -> None:
    torch.manual_seed(3)
    drafter.begin(len(pieces[0]))
    for counts in pieces:
        shape = len(counts), max(counts)
        features: Any = {key: torch.randn(*shape, target.config.hidden_size).bfloat16() for key in STATES}
        drafter.absorb(features, torch.randint(VOCAB, shape), counts)


def assert_same(ours: TokenTree, theirs: TokenTree) -> None:
    for name in ("tokens", "parents", "confidence"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pieces", [[[5]], [[9, 1, 4], [3, 2, 1], [1, 0, 2]]], ids=["one row", "three rows"])
@pytest.mark.parametrize("tree", ["confidence", "calibrated"])
def test_compiled_trees_are_those_grown_step_by_step(target: HFTarget, form: str, pieces: Any, tree: Any) -> None:
    for depth, width, branching, most in SIZES:
        config = EagleConfig(depth=depth, width=width, branching=branching, max_nodes=most, tree=tree)
        drafters = make_drafter(target, form, config), in_steps(make_drafter(target, form, config))
        for drafter in drafters:
            absorb(drafter, target, pieces)
        torch.testing.assert_close(drafters[0]._start, drafters[1]._start, rtol=0, atol=0)
        batch = greedy(*([7, 8, row] for row in range(len(pieces[0]))))
        trees = [drafter.propose(batch) for drafter in drafters]
        assert trees[0].num_nodes > 1
        assert_same(*trees)
        assert_same(drafters[0].propose(batch), trees[0])  # what was drafted leaves no trace


@torch.no_grad()
@pytest.mark.parametrize("mean", [2, 3, 5, 9])
def test_what_a_batch_has_no_use_for_is_not_expanded_and_changes_nothing(target: HFTarget, mean: int) -> None:
    """Of rows that share their nodes, the most promising of them are the same as of trees grown for each alone."""
    pieces = [[9, 4, 6, 1]]
    found = []
    for mean_nodes in (1 << 30, mean):
        drafter = make_drafter(target, "ours", EagleConfig(depth=5, width=4, branching=8, max_nodes=24))
        absorb(drafter, target, pieces)
        batch = greedy(*([3, 5 + row] for row in range(4)))
        batch.mean_nodes = mean_nodes
        found.append(drafter.propose(batch).most_promising(mean))
    assert found[0].mean_nodes == pytest.approx(mean)
    assert_same(*found)


@torch.no_grad()
def test_long_texts_are_read_in_chunks(target: HFTarget) -> None:
    drafters = make_drafter(target, "ours", EagleConfig()), in_steps(make_drafter(target, "ours", EagleConfig()))
    for drafter in drafters:
        absorb(drafter, target, [[1100, 700]])
    torch.testing.assert_close(drafters[0]._start, drafters[1]._start, rtol=0, atol=0)
    batch = greedy([7], [8])
    assert_same(drafters[0].propose(batch), drafters[1].propose(batch))


@torch.no_grad()
def test_rows_that_leave_take_their_entries_along(target: HFTarget) -> None:
    drafters = make_drafter(target, "ours", EagleConfig()), in_steps(make_drafter(target, "ours", EagleConfig()))
    for drafter in drafters:
        absorb(drafter, target, [[9, 1, 4], [3, 2, 1]])
        drafter.keep_rows(torch.tensor([2, 0]))
    batch = greedy([7], [8])
    assert_same(drafters[0].propose(batch), drafters[1].propose(batch))


@torch.no_grad()
def test_states_that_are_no_numbers_draft_nothing(target: HFTarget) -> None:
    drafter = make_drafter(target, "ours", EagleConfig())
    absorb(drafter, target, [[4, 4]])
    drafter._start[1] = torch.nan
    tree = drafter.propose(greedy([7], [8]))
    assert tree.valid[0].sum() > 1
    assert tree.valid[1].tolist() == [True] + [False] * (tree.num_nodes - 1)


@torch.no_grad()
def test_sampled_rows_and_penalties_are_ranked_step_by_step(target: HFTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise and penalties change the ranks, which the compiled call does not know."""
    drafter = make_drafter(target, "ours", EagleConfig())
    absorb(drafter, target, [[4]])

    def fail(*_: Any) -> Any:
        raise AssertionError("compiled")

    monkeypatch.setattr(drafter, "compiled_tree", fail)
    for params in (SamplingParams(temperature=1.0, seed=0), SamplingParams(repetition_penalty=1.3)):
        assert drafter.propose(greedy([7], params=params)).num_nodes > 1
    with pytest.raises(AssertionError, match="compiled"):
        drafter.propose(greedy([7]))


# --- draft models


def pruned_weights(target: HFTarget) -> DrafterWeights:
    module = PrunedLayers(target, [0, 1], vocab_size=60)
    module.copy_layers(target)
    assert module.vocabulary is not None
    module.vocabulary.copy_(torch.randperm(VOCAB)[:60].sort().values)
    return DrafterWeights("model", TargetFacts.of(target), {"layers": [0, 1], "vocab_size": 60}, module.state_dict())


def draft_model(target: HFTarget, kind: str) -> Any:
    torch.manual_seed(5)
    if kind == "pruned":
        return build_pruned(pruned_weights(target), target)
    model = tiny_model(head_dim=32, initializer_range=0.15, num_hidden_layers=3).bfloat16()
    pack_linears(model)
    make_lean(model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pruned", "whole"])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_draft_models_compiled_trees_are_those_of_its_passes(target: HFTarget, kind: str, rows: int) -> None:
    """Confidence is a sum over the vocabulary, whose order differs where most of it is impossible."""
    texts = [[*range(3 + row, 20 - 4 * row)] for row in range(rows)]
    for depth, beams, most in ((1, 4, 24), (5, 4, 24), (4, 8, 60), (6, 3, 5)):
        config = ModelConfig(depth=depth, beams=beams, max_nodes=most)
        drafters = [ModelDrafter(config, draft_model(target, kind)) for _ in range(2)]
        for drafter in drafters:
            drafter.bind(target, None)
            assert drafter._compiled is not None
        drafters[1]._compiled = None
        batch = greedy(*texts)
        for drafter in drafters:
            drafter.start(batch, None)
        for step in range(4):
            ours, theirs, again = (drafter.propose(batch) for drafter in (*drafters, drafters[0]))
            assert torch.equal(ours.tokens, theirs.tokens), (depth, beams, step)
            assert torch.equal(ours.parents, theirs.parents)
            torch.testing.assert_close(ours.confidence, theirs.confidence, rtol=1e-5, atol=1e-6)
            assert_same(ours, again)
            for row in batch.rows[: 1 + step % rows]:  # some rows go on by more tokens than others
                row.tokens.extend(range(40, 41 + step))
            if step == 2:
                batch = Batch(batch.rows[::-1], VOCAB)
                for drafter in drafters:
                    drafter.keep(batch, list(range(rows))[::-1])


def test_a_draft_model_made_to_order_has_the_targets_dtype(target: HFTarget, tmp_path: Path) -> None:
    save_weights(tmp_path, pruned_weights(target), card="")
    drafter = ModelDrafter(ModelConfig(model=str(tmp_path)))
    drafter.bind(target, None)
    assert drafter.draft_model.dtype == target.dtype == torch.bfloat16
    assert drafter._compiled is not None
    with pytest.raises(ValueError, match="unknown dtype 'bf17'"):
        ModelDrafter(ModelConfig(model=str(tmp_path), dtype="bf17")).bind(target, None)


@torch.no_grad()
def test_a_draft_model_that_somebody_listens_to_runs_through_its_modules(target: HFTarget) -> None:
    model = draft_model(target, "whole")
    model.base_model.layers[1].register_forward_hook(lambda *_: None)
    assert ModelDrafter(ModelConfig(), model)._compiled is None


@torch.no_grad()
def test_a_draft_model_drafts_on_where_rows_turn_to_sampling_and_back(target: HFTarget) -> None:
    """Compiled calls leave the pending token in the cache, passes do not."""
    drafters = [ModelDrafter(ModelConfig(depth=3), draft_model(target, "pruned")) for _ in range(2)]
    for drafter in drafters:
        drafter.bind(target, None)
    drafters[1]._compiled = None
    sampled = SamplingParams(temperature=1.0, seed=0)
    for drafter in drafters:
        drafter.start(greedy([5, 6, 7]), None)
    for params in (GREEDY, sampled, sampled, GREEDY, GREEDY, sampled):
        trees = [drafter.propose(greedy([5, 6, 7, 8], params=params)) for drafter in drafters]
        assert torch.equal(trees[0].tokens, trees[1].tokens)
        assert torch.equal(trees[0].parents, trees[1].parents)


def test_more_beams_than_the_kernels_rank_are_ranked_step_by_step(target: HFTarget) -> None:
    drafter = ModelDrafter(ModelConfig(depth=2, beams=MOST_TOP + 1, max_nodes=200), draft_model(target, "whole"))
    drafter.bind(target, None)
    batch = greedy([5, 6, 7])
    drafter.start(batch, None)
    tree = drafter.propose(batch)
    assert int((tree.parents == 0).sum()) > MOST_TOP


def test_what_would_reach_beyond_memory_is_refused(target: HFTarget) -> None:
    drafter = make_drafter(target, "ours", EagleConfig())
    absorb(drafter, target, [[4, 4]])
    with pytest.raises(ValueError, match="drafts for 1 rows are wanted, the cache has 2"):
        drafter.propose(greedy([7]))
    vocabulary = drafter.module.vocabulary
    vocabulary[-1] = VOCAB
    with pytest.raises(ValueError, match=f"names tokens .* to {VOCAB}, the target has {VOCAB}"):
        drafter._compile()


@torch.no_grad()
def test_caches_grow_with_the_text(target: HFTarget) -> None:
    drafters = [make_drafter(target, "ours", EagleConfig()) for _ in range(2)]
    in_steps(drafters[1])
    for drafter in drafters:
        absorb(drafter, target, [[500], *[[30]] * 12])
        assert drafter._cache.row_lengths == [860]
    assert_same(drafters[0].propose(greedy([7])), drafters[1].propose(greedy([7])))


@torch.no_grad()
def test_layers_in_groups_draft_with_packed_weights(target: HFTarget) -> None:
    """Compiled layers know no buffers that a group shares."""
    model = tiny_model(head_dim=32, initializer_range=0.15, num_hidden_layers=4).bfloat16()
    pack_linears(model)
    make_lean(model)
    drafter = LayerParallelDrafter(LayerParallelConfig(depth=3, group=2), model)
    drafter.bind(target, None)
    batch = greedy([5, 6, 7])
    drafter.start(batch, None)
    first = drafter.propose(batch)
    assert first.num_nodes > 4
    assert_same(drafter.propose(batch), first)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_what_was_accepted_of_a_tree_is_read_by_its_columns(target: HFTarget, form: str) -> None:
    """Of rows that had different numbers of nodes accepted; what stands in no such column is not looked at."""
    path, counts = torch.tensor([[0, 3, 4], [0, 2, 0], [0, 0, 0]]), [3, 2, 1]
    drafters = make_drafter(target, form, EagleConfig()), in_steps(make_drafter(target, form, EagleConfig()))
    for drafter in drafters:
        absorb(drafter, target, [[9, 1, 4]])
        features: Any = {key: torch.randn(3, 6, target.config.hidden_size).bfloat16() for key in STATES}
        for states in features.values():
            states[:, [1, 5]] = torch.nan
        drafter.absorb_path(features, path, torch.tensor([[5, 6, 7], [8, 9, 0], [1, 0, 0]]), counts)
        assert drafter._cache.row_lengths == [12, 3, 5]
    assert drafters[0]._start.isfinite().all()
    torch.testing.assert_close(drafters[0]._start, drafters[1]._start, rtol=0, atol=0)
    batch = greedy([7], [8], [9])
    assert_same(drafters[0].propose(batch), drafters[1].propose(batch))

"""Draft models beside their target: the tree that pays by both curves and the way between, and what lies where."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.architectures import VOCAB, generate_alone, tiny_model
from test_model_prompts import write_prompts
from unit_rows import make_batch

from specdec import SpecDecoder, placement
from specdec.drafters import model as model_module
from specdec.drafters.layer_parallel import LayerParallelConfig, LayerParallelDrafter
from specdec.drafters.model import USUAL_DEPTH, ModelConfig, ModelDrafter
from specdec.drafters.pruned import PrunedLayers
from specdec.drafters.weights import TargetFacts, load_weights, write_config
from specdec.latency import LatencyCurve, LatencyKey
from specdec.models import find_device
from specdec.optimal_tree import OptimalTrees
from specdec.placement import USUAL_CHANCES, DraftPlan, Link, by_levels, measure_link, plan_draft
from specdec.target import HFTarget
from specdec.training.method import create_method

FAST = LatencyCurve.simple({1: 1.0, 64: 1.2})  # a device that waits for its memory
SLOW = LatencyCurve.simple({1: 100.0, 4: 160.0, 16: 220.0, 64: 380.0})
SMALL_ON_SLOW = LatencyCurve.simple({1: 12.0, 4: 16.0, 16: 20.0})


def by_hand(target: LatencyCurve, draft: LatencyCurve, link: Link, node_bytes: int) -> tuple[float, int, int]:
    """Tokens per millisecond, nodes and depth of the best tree, all of them tried."""
    trees = OptimalTrees(USUAL_CHANCES, 12, 4)
    found = (1 / target.at(1), 1, 0)
    for depth, nodes in product(range(1, 5), range(2, 13)):
        tokens = trees.tokens(nodes, depth)
        if tokens is not None:
            copies = 2 * link.latency_ms + nodes * node_bytes / link.bytes_per_ms
            drafting = draft.at(tokens) + (depth - 1) * draft.at(4)
            found = max(found, (tokens / (target.at(nodes) + drafting + copies), nodes, depth))
    return found


@pytest.mark.parametrize("link", [Link(), Link(0.05, 1e7), Link(20.0, 100.0)])
@pytest.mark.parametrize("curves", [(SLOW, FAST), (FAST, SMALL_ON_SLOW), (SLOW, SMALL_ON_SLOW), (FAST, FAST)])
def test_the_plan_is_the_best_of_all_trees(curves: tuple[LatencyCurve, LatencyCurve], link: Link) -> None:
    target, draft = curves
    plan = plan_draft(target, draft, link, max_nodes=12, max_depth=4, node_bytes=400)
    rate, _, _ = by_hand(target, draft, link, 400)
    assert plan.speedup == pytest.approx(rate * target.at(1))
    assert plan.speedup >= 1.0


def test_a_slow_target_takes_deep_but_small_trees_from_a_fast_drafter() -> None:
    """Dovetail's case: every node costs the target, levels are nearly free."""
    crossed = plan_draft(SLOW, FAST, Link(0.05, 1e7))
    flat = plan_draft(LatencyCurve.simple({1: 100.0, 64: 120.0}), FAST, Link(0.05, 1e7))
    assert crossed.depth >= 2
    assert crossed.nodes < flat.nodes
    assert crossed.speedup > 1.3
    levels = plan_draft(SLOW, SMALL_ON_SLOW)
    assert levels.depth <= crossed.depth, "levels that cost something are fewer"


def test_a_level_costs_what_a_pass_over_its_nodes_does() -> None:
    """Not one over the whole tree, nor one over a single node: the draft model's curve is steep in between."""
    steep = LatencyCurve.simple({1: 1.0, 2: 2.0, 8: 60.0, 64: 1000.0})
    sure = {"chances": (0.8,), "max_nodes": 6}  # chains
    chains = plan_draft(SLOW, steep, draft_nodes=by_levels(1), **sure)
    ms = SLOW.at(6) + steep.at(chains.tokens) + 4 * 1.0
    assert (chains.nodes, chains.depth) == (6, 5)
    assert chains.speedup == pytest.approx(chains.tokens * SLOW.at(1) / ms)
    wide = plan_draft(SLOW, steep, draft_nodes=by_levels(8), **sure)
    assert wide.depth == 1, "every further level is a pass over 8 nodes, 60 ms"
    assert wide.speedup == pytest.approx(1.8 * SLOW.at(1) / (SLOW.at(2) + steep.at(1.8)))
    again = plan_draft(SLOW, steep, draft_nodes=by_levels(1, again=1), **sure)
    assert again.speedup < chains.speedup


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_the_passes_planned_are_those_that_are_run(num_tokens: int, tmp_path: Path) -> None:
    """Of a draft model by itself, and with so many prompt tokens."""
    target, model = HFTarget(tiny_model(initializer_range=0.15)), tiny_model(initializer_range=0.15)
    with torch.no_grad():
        model.lm_head.weight += 0.05 * torch.randn(
            model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0)
        )
    folder = write_prompts(tmp_path, model, num_tokens, ensembles=2) if num_tokens else ""
    drafter = ModelDrafter(ModelConfig(depth=5, beams=3, max_nodes=100, prompt_tokens=folder), model)
    run, propose = drafter.draft_model._run, drafter.propose
    widths: list[list[int]] = []
    lengths: list[int] = []

    def recorded(now: Any, tokens: torch.Tensor, *rest: Any) -> Any:
        widths[-1].append(tokens.shape[1])
        return run(now, tokens, *rest)

    def proposed(batch: Any) -> Any:
        widths.append([])
        lengths.append(len(batch.rows[0].tokens))
        return propose(batch)

    drafter.draft_model._run, drafter.propose = recorded, proposed  # type: ignore[method-assign]
    decoder = SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise")
    decoder.generate([5, 6, 7], max_new_tokens=60, ignore_eos=True)
    seen = set()
    for passes, before, length in zip(widths[1:], lengths, lengths[1:], strict=False):
        if length <= 3 + 60 - 6:  # there is room for all levels
            assert passes == drafter._draft_nodes(5, length - before)
            seen.add(length - before)
    assert len(seen) > 1, "steps of one length would not tell"


def test_where_nothing_pays_nothing_is_drafted() -> None:
    nothing = DraftPlan(nodes=1, depth=0, tokens=1.0, speedup=1.0)
    assert plan_draft(FAST, SMALL_ON_SLOW) == nothing
    assert plan_draft(SLOW, FAST, Link(latency_ms=200.0)) == nothing
    assert plan_draft(SLOW, FAST, Link(bytes_per_ms=1e3), node_bytes=200_000) == nothing  # whole distributions cross


@pytest.mark.parametrize("values", [{"latency_ms": -1.0}, {"bytes_per_ms": 0.0}, {"latency_ms": float("nan")}])
def test_links_that_are_none_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a link takes time and has a rate above 0"):
        Link(**values)


def test_within_a_device_nothing_crosses() -> None:
    assert measure_link(torch.device("cpu"), torch.device("cpu")) == Link(0.0, float("inf"))


def test_a_link_is_measured_there_and_back_by_a_small_and_a_large_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simulated link: 3 ms each way and 1 MiB a millisecond; the first copy of a size, and one stall, are slow."""
    now, moves = [0.0], [0]

    nothing = torch.zeros(())

    class Moved:
        def __init__(self, count: int) -> None:
            self.count = count

        def to(self, _: torch.device) -> Any:
            moves[0] += 1
            slow = 50.0 if moves[0] in (1, 9, 17) else 0.0
            now[0] += 0.003 + 8 * self.count / (1 << 20) / 1000.0 + slow / 1000.0
            return self

        def __getitem__(self, _: int) -> torch.Tensor:
            return nothing

    monkeypatch.setattr(placement.torch, "zeros", lambda count, **_: Moved(count))
    monkeypatch.setattr(placement, "perf_counter", lambda: now[0])
    link = measure_link(torch.device("cpu"), torch.device("meta"))
    assert link.latency_ms == pytest.approx(3.0, rel=1e-3)
    assert link.bytes_per_ms == pytest.approx(1 << 20, rel=1e-3)


def test_the_drafter_plans_its_depth_by_the_profiles_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = HFTarget(tiny_model()), tiny_model(seed=1)
    curves: dict[LatencyKey, LatencyCurve] = {}
    monkeypatch.setattr(model_module, "load_curve", curves.get)

    def depth_of(draft_curve: LatencyCurve) -> int:
        drafter = ModelDrafter(ModelConfig(depth=0), draft)
        curves[LatencyKey.of(target)] = SLOW
        curves[LatencyKey.of(drafter.draft_model)] = draft_curve
        drafter.bind(target, None)
        return drafter.depth

    assert TargetFacts.of(target).fingerprint != TargetFacts.of(HFTarget(draft)).fingerprint
    assert depth_of(FAST) == plan_draft(SLOW, FAST).depth
    assert depth_of(SLOW) == 1, "at least one level; the planner decides whether to ask for it"
    assert ModelDrafter(ModelConfig(depth=3), draft).depth == 3


def test_profiles_that_are_not_there_are_named_with_what_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    target = HFTarget(tiny_model())
    drafter = ModelDrafter(ModelConfig(depth=0), tiny_model(seed=1))
    curves = {LatencyKey.of(target): SLOW, LatencyKey.of(drafter.draft_model): FAST}
    options = f"--dtype float32 --device cpu --threads {torch.get_num_threads()}"
    for found, lacking in (
        ({LatencyKey.of(target)}, [f"`specdec profile -m DRAFT {options}`"]),
        (set(), [f"`specdec profile -m TARGET {options}`", f"`specdec profile -m DRAFT {options}`"]),
    ):
        monkeypatch.setattr(model_module, "load_curve", {key: curves[key] for key in found}.get)
        with pytest.warns(RuntimeWarning, match="goes by profiles that are not there, so it drafts 5 levels") as seen:
            drafter.bind(target, None)
        assert f"run {' and '.join(lacking)}, with" in str(seen[0].message)
        assert drafter.depth == USUAL_DEPTH


def made_to_order(target: HFTarget, folder: Path, hit_rates: list[list[float]] | None = None) -> ModelConfig:
    """A draft model of two of the target's layers, which plans its depth."""
    method = create_method("model", target, {"layers": 2, "vocab_size": 0})
    method.prepare(torch.ones(target.vocab_size))
    method.save(folder, {})
    if hit_rates is not None:
        write_config(folder, replace(load_weights(folder), hit_rates=hit_rates))
    return ModelConfig(model=str(folder), depth=0, max_nodes=12)


@pytest.mark.parametrize("where", ["calibration", "training"])
def test_a_draft_models_own_hit_rates_are_planned_by(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = HFTarget(tiny_model(num_hidden_layers=4))
    whole = LatencyKey.of(target)
    monkeypatch.setattr(model_module, "load_curve", lambda key: SLOW if key == whole else SMALL_ON_SLOW)
    rates = [[0.9, 0.05, 0.01, 0.01, 0.01]] * 3
    config = made_to_order(target, tmp_path, rates)
    if where == "training":
        weights = load_weights(tmp_path)
        write_config(tmp_path, replace(weights, hit_rates=(), facts={"held_out": {"hit_rates": rates}}))
    drafter = ModelDrafter(config)
    drafter.bind(target, None)
    ranks = [[0.9, 0.05, 0.01, 0.01]] * 5  # as many as children are drafted, deeper levels as the last
    plan = plan_draft(SLOW, SMALL_ON_SLOW, chances=ranks, max_nodes=12)
    assert (drafter.depth, drafter.nodes) == (plan.depth, plan.nodes)
    usual = plan_draft(SLOW, SMALL_ON_SLOW, max_nodes=12)
    assert plan.depth > usual.depth, "else the usual chances would do as well"


def test_calibrated_rates_are_what_the_planner_begins_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "load_curve", lambda _: FAST)
    target = HFTarget(tiny_model(num_hidden_layers=4))
    rates = [[0.8, 0.1], [0.6, 0.1]]
    for hit_rates in (None, rates):
        drafter = ModelDrafter(replace(made_to_order(target, tmp_path, hit_rates), depth=2, max_nodes=3))
        drafter.bind(target, None)
        if hit_rates is None:
            assert drafter.expected_accepted((1, 2, 3, 64)) is None
    whole = 0.8 + 0.8 * 0.6  # a chain of two is better than two children
    assert drafter.expected_accepted((1, 2, 3, 64)) == pytest.approx([0.0, 0.8, whole, whole])
    for group in (1, 2):  # passes in groups are right less often, by how much nobody measured
        grouped = LayerParallelDrafter(LayerParallelConfig(model=str(tmp_path), group=group))
        grouped.bind(target, None)
        assert (grouped.expected_accepted((2,)) is None) == (group > 1)


def test_fixed_trees_are_of_the_planned_size_others_of_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "load_curve", lambda _: FAST)
    flat = DraftPlan(nodes=3, depth=2, tokens=2.0, speedup=1.5)
    monkeypatch.setattr(model_module, "plan_draft", lambda *_, **__: flat)
    drafter = ModelDrafter(ModelConfig(depth=0, max_nodes=9), tiny_model(seed=1))
    drafter.bind(HFTarget(tiny_model()), None)
    for siblings in ("deterministic", "with_replacement"):
        batch = make_batch([[5, 6, 7]], VOCAB)
        batch.siblings = siblings  # type: ignore[assignment]
        drafter.start(batch, None)
        assert drafter.propose(batch).num_nodes == 3
        batch.max_nodes = batch.mean_nodes = 8
        assert drafter.propose(batch).num_nodes > 3
        drafter.stop()


def test_text_does_not_depend_on_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "load_curve", lambda _: SLOW)
    target = tiny_model()
    drafter = ModelDrafter(ModelConfig(depth=0), tiny_model(seed=1))
    decoder = SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise")
    result = decoder.generate([5, 6, 7], max_new_tokens=16, ignore_eos=True)
    assert drafter.depth == 1
    assert max(decoder.stats.offered_depth) == 1
    assert result.token_ids == generate_alone(target, [5, 6, 7], 16, eos_token_id=None)


def test_a_draft_model_elsewhere_takes_copies_and_leaves_the_target_where_it_is() -> None:
    target = HFTarget(tiny_model())
    module = PrunedLayers(target, [0, 1], vocab_size=40)
    module.copy_layers(target)
    elsewhere = module.model(target, torch.device("meta"), torch.float32)
    assert {tensor.device.type for tensor in elsewhere.parameters()} == {"meta"}
    assert {tensor.device.type for tensor in elsewhere.buffers()} == {"meta"}
    assert {tensor.device.type for tensor in target.model.parameters()} == {"cpu"}
    assert {tensor.device.type for tensor in target.model.buffers()} == {"cpu"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"drafter": "ngram"}, "drafter 'ngram' runs on the target's device: it takes no draft_device 'cpu'"),
        ({"drafter": ModelDrafter(model=tiny_model())}, "goes with a drafter's name; this one is constructed already"),
        ({"drafter": "model", "drafter_options": {"device": "cuda"}}, "given twice: 'cpu' and 'cuda'"),
        ({"drafter": "ngram+suffix"}, r"drafter 'ngram\+suffix' runs on the target's device: it takes no draft_device"),
        (
            {"drafter": "suffix+model", "drafter_options": {"model.device": "cuda"}},
            "given twice: 'cpu' and 'cuda' as 'model.device'",
        ),
        ({"drafter": "suffix+modell"}, "unknown drafter 'modell'; did you mean 'model'"),
        ({"drafter": "suffix+none"}, "'none' cannot be part of a hybrid"),
    ],
)
def test_a_draft_device_that_means_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpecDecoder(tiny_model(), draft_device="cpu", **arguments)


def test_devices_are_checked_before_anything_loads(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device 'meta' holds no values"):
        find_device("meta")
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        SpecDecoder(str(tmp_path / "nowhere"), "model", drafter_options={"model": str(tmp_path)}, draft_device="gpu")


def test_the_draft_device_reaches_every_part_that_runs_a_model(tmp_path: Path) -> None:
    tiny_model(num_hidden_layers=4).save_pretrained(tmp_path)
    target = tiny_model()
    options = {"model.model": str(tmp_path), "layer_parallel.model": str(tmp_path)}
    decoder = SpecDecoder(
        target, "suffix+model+layer_parallel", drafter_options=options, draft_device="cpu", adaptive=False,
        on_drafter_error="raise",
    )  # fmt: skip
    for part in decoder.drafter.parts[1:]:
        assert isinstance(part, ModelDrafter)
        assert part.config.device == "cpu"
        assert part.draft_model.device == torch.device("cpu")
    result = decoder.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True)
    assert result.token_ids == generate_alone(target, [5, 6, 7], 8, eos_token_id=None)
    for device, message in (("gpu", "unknown device 'gpu'"), ("meta", "device 'meta' holds no values")):
        with pytest.raises(ValueError, match=message):
            SpecDecoder(target, "suffix+model", drafter_options={"model.model": str(tmp_path)}, draft_device=device)


def test_the_draft_device_reaches_the_draft_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    decoder = SpecDecoder(tiny_model(), "model", drafter_options={"model": str(tmp_path)}, draft_device="cpu")
    assert isinstance(decoder.drafter, ModelDrafter)
    assert decoder.drafter.draft_model.device == torch.device("cpu")
    assert decoder.drafter.config.device == "cpu"

"""The plan is what is really allocated; what does not fit is shrunk, and refused with the numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from integration.architectures import tiny_model
from integration.scripted import ScriptedDrafter, per_row
from integration.untrained import untrained_eagle
from specdec import SpecDecoder, memory, memory_plan
from specdec.drafters.clover import CloverDrafter, make_clover
from specdec.drafters.heads import HeadDrafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.layer import LayerShape
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.drafters.none import NoneDrafter
from specdec.drafters.pruned import PrunedLayers, build_pruned
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.weights import DrafterWeights, TargetFacts
from specdec.lean_stack import make_lean
from specdec.memory import parse_size, size_text, stored_bytes
from specdec.memory_plan import Workload, drafter_kv, drafter_weights, estimate, plan_memory
from specdec.model_shape import ModelShape
from specdec.packing import pack_linears
from specdec.panels import panels_run
from specdec.prefix import SharedWork
from specdec.target import HFTarget

SLACK = 2**19
"""What is not planned for: the attention kernel's buffers per thread, indices, noise."""

MODEL = ModelShape(
    weights=1000, layers=2, hidden=8, inner=16, queries=8, keys=4, cached=8, group=2, vocab=50, element=4
)  # fmt: skip


def model() -> LlamaForCausalLM:
    """Not so tiny that the slack would hide a mistake."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(model())


@pytest.fixture(scope="module", params=["float32", "bfloat16, compiled"])
def each_target(request: pytest.FixtureRequest) -> HFTarget:
    if request.param == "float32":
        return HFTarget(model())
    if not panels_run():
        pytest.skip("no C compiler: nothing is compiled")
    compiled = model().bfloat16()
    pack_linears(compiled)
    make_lean(compiled)
    return HFTarget(compiled)


@pytest.fixture(scope="module")
def small() -> HFTarget:
    return HFTarget(tiny_model())


def star_drafter(nodes: int) -> ScriptedDrafter:
    """Trees of so many nodes that are all wrong."""

    def fill(builder: Any, index: int, tokens: Sequence[int]) -> None:
        for token in range(7000, 7000 + nodes - 1):
            builder.add(0, token)

    return ScriptedDrafter(per_row(fill))


def peak_bytes(
    decoder: SpecDecoder, prompts: list[list[int]], trace: Path, pieces: int | None = None, **fields: Any
) -> int:
    """The most that was allocated at a time in a call's prefill and first passes, beside what was there before."""
    decoder.generate(prompts[:1], max_new_tokens=1)
    with (
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        decoder.stream(prompts, ignore_eos=True, **fields) as stream,
    ):
        for _ in range(pieces or 3 * len(prompts)):
            next(stream)
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    assert len(events) > 100
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize(
    ("rows", "prompt_len", "nodes", "new_tokens"),
    [
        (1, 600, 16, 8),  # the prompt's masks are most
        (4, 600, 16, 8),
        (4, 40, 64, 90),  # the tree's logits
        (1, 40, 200, 220),
        (8, 100, 4, 40),  # the MLP
        (1, 40, 4, 3000),  # keys and values
    ],
)
@pytest.mark.parametrize("sampled", [False, True])
def test_the_plan_is_within_ten_percent_of_what_is_allocated(
    each_target: HFTarget, tmp_path: Path, rows: int, prompt_len: int, nodes: int, new_tokens: int, sampled: bool
) -> None:
    decoder = SpecDecoder(each_target, star_drafter(nodes), adaptive=False)
    prompts = [[row + 1] + [3] * (prompt_len - 1) for row in range(rows)]
    fields = {"temperature": 0.8, "seed": 1} if sampled else {}
    peak = peak_bytes(decoder, prompts, tmp_path / "trace.json", max_new_tokens=new_tokens, **fields)
    work = Workload(rows, prompt_len, prompt_len + new_tokens, nodes, sampled=sampled)
    plan = estimate(ModelShape.of(each_target), 0, work, rows, nodes)
    assert plan.working == pytest.approx(peak, rel=0.1, abs=SLACK), plan.describe()


@pytest.mark.parametrize("nodes", [1, 16])
def test_what_prompts_share_is_planned_once(each_target: HFTarget, tmp_path: Path, nodes: int) -> None:
    decoder = SpecDecoder(each_target, "none" if nodes == 1 else star_drafter(nodes), adaptive=False)
    prompts = [[3] * 1500 + [row, 4, 5] for row in range(8)]
    peak = peak_bytes(decoder, prompts, tmp_path / "trace.json", max_new_tokens=40)
    shape, work = ModelShape.of(each_target), Workload(8, 1503, 1543, nodes)
    shared = replace(work, shared=SharedWork.of([tuple(prompt[:-1]) for prompt in prompts]))
    plan = estimate(shape, 0, shared, 8, nodes)
    assert plan.working == pytest.approx(peak, rel=0.1, abs=SLACK), plan.describe()
    assert plan.kv < estimate(shape, 0, work, 8, nodes).kv / 3
    if nodes == 1:
        tight = SpecDecoder(each_target, "none", memory_budget=plan.total)
        tight.generate(prompts, max_new_tokens=40, ignore_eos=True)
        assert tight.memory_plan == plan


def test_what_waiting_rows_share_is_planned_once(target: HFTarget, tmp_path: Path) -> None:
    """Two rows at a time; the others join them, and hold what is their own alone."""
    prompts = [[3] * 1500 + [row, *[4] * 200] for row in range(6)]
    decoder = SpecDecoder(target, "none", max_rows=2)
    peak = peak_bytes(decoder, prompts, tmp_path / "trace.json", pieces=100, max_new_tokens=24)
    plan = decoder.memory_plan
    assert plan is not None
    assert plan.rows == 2
    assert plan.working == pytest.approx(peak, rel=0.1, abs=SLACK), plan.describe()
    assert plan.kv == (1500 + 200 + 2 * (200 + 1 + 24 + 1)) * ModelShape.of(target).kv_bytes_per_token


@pytest.mark.parametrize("max_rows", [None, 2])
def test_hidden_states_of_prefixes_are_counted(target: HFTarget, tmp_path: Path, max_rows: int | None) -> None:
    """Of nested ones, which a drafter reads whole; the plan is for a moment at which nothing is dropped yet."""

    class Reading(NoneDrafter):
        features = ("last", 1, 2)
        takes_rows = True

        def join(self, *_: Any) -> None:
            pass

    decoder = SpecDecoder(target, Reading(), max_rows=max_rows, on_drafter_error="raise")
    prompts = [[3] * 900 + [row // 2] * 300 + [row, *[4] * 20] for row in range(6)]
    peak = peak_bytes(decoder, prompts, tmp_path / "trace.json", pieces=60, max_new_tokens=24)
    assert decoder.memory_plan is not None
    assert peak - SLACK <= decoder.memory_plan.working <= 2 * peak


def test_a_prompt_that_is_computed_beside_others_is_counted(each_target: HFTarget, tmp_path: Path) -> None:
    """Two rows at a time; the third prompt is computed before its row joins."""
    prompts = [[row + 1] + [3] * 999 for row in range(3)]
    work = Workload(3, 1000, 1030, 1)
    budget = estimate(ModelShape.of(each_target), 0, work, 2, 1).total
    decoder = SpecDecoder(each_target, "none", memory_budget=budget)
    peak = peak_bytes(decoder, prompts, tmp_path / "trace.json", pieces=85, max_new_tokens=30)
    plan = decoder.memory_plan
    assert plan is not None
    assert (plan.rows, plan.total) == (2, budget)
    assert plan.working == pytest.approx(peak, rel=0.1, abs=SLACK), plan.describe()


def test_weights_and_a_draft_models_cache_are_counted(target: HFTarget) -> None:
    exact = sum(parameter.nbytes for parameter in target.model.parameters())
    buffers = sum(buffer.nbytes for buffer in target.model.buffers())
    assert ModelShape.of(target).weights == exact + buffers
    draft = tiny_model()
    drafter = ModelDrafter(ModelConfig(), model=draft)
    shape = ModelShape.of(HFTarget(draft))
    assert drafter_weights(drafter, target) == shape.weights
    kept = 2 * (100 + memory_plan.SPARE_SLOTS) * shape.kv_bytes_per_token
    assert drafter_kv(drafter, rows=2, length=100) == kept


def clover(target: HFTarget, vocab_size: int) -> CloverDrafter:
    shape = {"layer": asdict(LayerShape.of(target)), "vocab_size": vocab_size}
    weights = DrafterWeights("clover", TargetFacts.of(target), shape, make_clover(shape).state_dict())
    return CloverDrafter(weights=weights)


@pytest.mark.parametrize("make", [untrained_eagle, clover])
@pytest.mark.parametrize("vocab_size", [0, 20])
def test_a_head_counts_without_what_is_the_targets(
    small: HFTarget, make: Callable[[HFTarget, int], HeadDrafter], vocab_size: int
) -> None:
    drafter = make(small, vocab_size)
    drafter.bind(small, None)
    rows = vocab_size * small.config.hidden_size * 4
    own = stored_bytes([*drafter.module.parameters(), *drafter.module.buffers()])
    assert drafter_weights(drafter, small) == own + rows
    assert drafter_weights(HybridDrafter([drafter, SuffixDrafter()]), small) == own + rows


@pytest.mark.parametrize("vocab_size", [0, 20])
def test_a_draft_model_of_the_targets_layers_counts_without_its_embeddings(small: HFTarget, vocab_size: int) -> None:
    shape = {"layers": [1], "vocab_size": vocab_size}
    module = PrunedLayers(small, **shape)
    layers = sum(parameter.nbytes for parameter in module.body.parameters())
    weights = DrafterWeights("model", TargetFacts.of(small), shape, module.state_dict())
    drafter = ModelDrafter(ModelConfig(), model=build_pruned(weights, small))
    rotary = sum(buffer.nbytes for buffer in drafter.draft_model.model.base_model.buffers())
    head = vocab_size * (small.config.hidden_size * 4 + 8)  # rows, and their ids
    assert drafter_weights(drafter, small) == layers + rotary + head


@pytest.mark.parametrize("make", [untrained_eagle, clover])
@pytest.mark.parametrize(("prompt_len", "new_tokens"), [(20, 20), (600, 30), (500, 60)])
def test_keys_and_values_of_a_head_are_as_planned_at_most(
    make: Callable[[HFTarget, int], HeadDrafter], prompt_len: int, new_tokens: int
) -> None:
    target = HFTarget(tiny_model(max_position_embeddings=1024))
    drafter, kept = make(target, 0), []
    absorb = drafter.absorb

    def spy(*arguments: Any) -> None:
        absorb(*arguments)
        kept.append(drafter._cache.num_bytes)

    drafter.absorb = spy  # type: ignore[method-assign]
    decoder = SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise")
    prompts = [[row + 3] * prompt_len for row in range(2)]
    decoder.generate(prompts, max_new_tokens=new_tokens, ignore_eos=True)
    planned = drafter_kv(drafter, 2, prompt_len + new_tokens)
    assert planned / 2.2 <= max(kept) <= planned
    assert decoder.memory_plan is not None
    assert decoder.memory_plan.drafter >= drafter_weights(drafter, target) + planned


def test_keys_and_values_of_a_drafter_come_out_of_what_is_free(
    small: HFTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter = untrained_eagle(small, 0)
    decoder = SpecDecoder(small, drafter)
    decoder.generate([1, 2], max_new_tokens=5)
    assert decoder.memory_plan is not None
    least = estimate(ModelShape.of(small), 0, Workload(1, 2, 7, 1, features=1), 1, 1).working
    monkeypatch.setattr("specdec.call_memory.free_bytes", lambda device: least + drafter_kv(drafter, 1, 7))
    assert decoder.generate([1, 2], max_new_tokens=5).token_ids
    monkeypatch.setattr("specdec.call_memory.free_bytes", lambda device: least + drafter_kv(drafter, 1, 7) - 1)
    with pytest.raises(ValueError, match="may be used"):
        decoder.generate([1, 2], max_new_tokens=5)


def test_kv_bytes_are_those_of_a_cache(target: HFTarget) -> None:
    cache = target.new_cache(1, 1)
    with torch.inference_mode():
        target.extend([[0]], cache)
    assert ModelShape.of(target).kv_bytes_per_token == cache.num_bytes


# What does not fit

WORK = Workload(rows=8, prompt_len=20, max_len=60, nodes=32)


def needs(rows: int, nodes: int) -> int:
    return estimate(MODEL, 500, WORK, rows, nodes).total


def test_all_that_fits_is_planned_whole() -> None:
    for budget in (None, needs(8, 32)):
        plan = plan_memory(MODEL, 500, WORK, budget)
        assert (plan.rows, plan.nodes) == (8, 32)


def test_trees_shrink_first_and_then_the_batch() -> None:
    assert plan_memory(MODEL, 500, WORK, needs(8, 32) - 1).rows == 8
    assert plan_memory(MODEL, 500, WORK, needs(8, 32) - 1).nodes < 32
    fewer = plan_memory(MODEL, 500, WORK, min(needs(8, n) for n in range(1, 33)) - 1)
    assert fewer.rows == 4
    assert fewer.nodes > 1  # half the rows leave room for trees again


def test_every_plan_keeps_its_budget_and_a_larger_one_never_gives_less() -> None:
    least, most = needs(1, 1), needs(8, 32)
    before = (0, 0)
    for budget in range(least, most + 500, 97):
        plan = plan_memory(MODEL, 500, WORK, budget)
        assert plan.total <= budget
        assert (plan.rows, plan.nodes) >= before
        before = plan.rows, plan.nodes
    assert before == (8, 32)


def test_what_cannot_run_at_all_is_refused_with_the_numbers() -> None:
    least = needs(1, 1)
    with pytest.raises(ValueError, match=r"are needed and .* may be used: weights 1000 B, drafter 500 B, kv"):
        plan_memory(MODEL, 500, WORK, least - 1)
    assert plan_memory(MODEL, 500, WORK, least).rows == 1


PROMPTS = [[5, 6, 7, 8, 5, 6], [9, 10], [11], [12, 13, 12, 13], [14, 15, 16]]


def test_groups_of_rows_write_what_all_at_once_would(small: HFTarget) -> None:
    fields: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.9, "seed": 4, "ignore_eos": True}
    whole = SpecDecoder(small, "suffix", memory_budget="1GiB")
    expected = whole.generate(PROMPTS, **fields)
    assert whole.memory_plan is not None
    assert whole.memory_plan.rows == len(PROMPTS)
    shape = ModelShape.of(small)
    work = Workload(len(PROMPTS), 6, 26, 1, sampled=True)
    tight = SpecDecoder(small, "suffix", memory_budget=estimate(shape, 0, work, 2, 1).total, on_drafter_error="raise")
    with tight.stream(PROMPTS, **fields) as stream:
        order = [piece.index for piece in stream]
    assert tight.memory_plan is not None
    assert tight.memory_plan.rows == 2
    assert [result.token_ids for result in stream.results] == [result.token_ids for result in expected]
    assert max(order[:40]) == 1  # two at a time, in turn
    assert order[-1] == 4
    assert tight.stats.passes == sum(20 for _ in PROMPTS)
    assert "no room for drafts" in (tight.stats.plain_reason or "")


def test_trees_are_cut_to_what_fits(small: HFTarget) -> None:
    shape = ModelShape.of(small)
    budget = estimate(shape, 0, Workload(1, 6, 36, 64), 1, 4).total
    decoder = SpecDecoder(small, star_drafter_of(40), memory_budget=budget, adaptive=False, on_drafter_error="raise")
    stats = decoder.generate(PROMPTS[0], max_new_tokens=30, ignore_eos=True).stats
    assert decoder.memory_plan is not None
    assert decoder.memory_plan.nodes == 4
    assert stats.drafted <= 3 * stats.passes
    assert stats.drafted > 0


def star_drafter_of(nodes: int) -> ScriptedDrafter:
    """As ``star_drafter``, of a small vocabulary."""
    return ScriptedDrafter(per_row(lambda builder, _, tokens: [builder.add(0, t) for t in range(nodes - 1)]))


def test_a_call_that_cannot_run_says_so_before_it_starts(small: HFTarget) -> None:
    decoder = SpecDecoder(small, "none", memory_budget="100kB")
    with pytest.raises(ValueError, match=r"97\.66 KiB may be used: weights"):
        decoder.generate([1, 2], max_new_tokens=5)


def test_without_a_budget_what_is_free_counts(small: HFTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = SpecDecoder(small, "none")
    assert decoder.generate([1, 2], max_new_tokens=5).token_ids
    monkeypatch.setattr("specdec.call_memory.free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match="may be used"):
        decoder.generate([1, 2], max_new_tokens=5)
    monkeypatch.setattr("specdec.call_memory.free_bytes", lambda device: None)
    assert decoder.generate([1, 2], max_new_tokens=5).token_ids


def test_a_containers_limit_counts_without_files_that_can_be_dropped(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 550\nactive_file 50\n")
    assert memory._container_bytes(tmp_path) == 650
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_bytes(tmp_path) is None
    assert memory._container_bytes(tmp_path / "none") is None


def test_free_memory_is_within_what_the_machine_has() -> None:
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or 0 < free < 2**50


@pytest.mark.parametrize(
    ("text", "count"),
    [("2GiB", 2**31), ("500 MB", 500_000_000), ("1.5kib", 1536), (4096, 4096), ("7", 7), ("3B", 3), ("1TB", 10**12)],
)
def test_sizes_are_read(text: str | int, count: int) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["", "2 gigs", "-1GiB", "GiB", "0", "1e9", "two"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="such as 2GiB"):
        parse_size(text)


def test_sizes_are_written_in_binary_units() -> None:
    assert [size_text(count) for count in (512, 2048, 3 * 2**20, 5 * 2**30)] == ["512 B", "2 KiB", "3 MiB", "5 GiB"]

"""Every figure, on runs whose figures can be computed by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from specdec.benchmarks.roofline import Roofline, kv_bytes_per_token, latency_curve, measure_bandwidth, weight_bytes
from specdec.benchmarks.schema import CategoryFloor, Interval, Run, Summary
from specdec.benchmarks.summary import bootstrap, figures, floor_text, paired_ratios, summarise
from specdec.target import HFTarget

MakeRun = Callable[..., Run]
ROOFLINE = Roofline(bandwidth_gb_s=10.0, weight_bytes=40_000_000, kv_bytes_per_token=1_000_000)


def decode(run: Run) -> float:
    return run.decode_ms


def times(total: float) -> dict[str, float]:
    return {"prefill": 5.0, "target": total}


def test_figures_of_one_run(make_run: MakeRun) -> None:
    found = figures([make_run()], [make_run("none", milliseconds=times(200.0), wall_ms=300.0)], ROOFLINE)
    assert found.num_runs == 1
    assert found.emitted == 8
    assert found.decode_tokens_per_s == pytest.approx(8 / 0.1)
    assert found.end_to_end_tokens_per_s == pytest.approx(8 / 0.12)
    assert found.speedup == Interval(2.0, 2.0, 2.0)
    assert found.end_to_end_speedup == Interval(2.5, 2.5, 2.5)
    assert found.tau == 2.0
    assert found.acceptance_by_depth == [0.75, 0.25, 0.0]
    assert found.milliseconds_per_pass == {"draft": 2.0, "target": 20.0, "accept": 1.0, "commit": 0.5, "other": 1.5}
    assert found.first_token_ms == 40.0
    # (40 MB + 14 tokens of 1 MB) at 10 GB/s are 5.4 ms; a pass takes 20.
    assert found.roofline_fraction == pytest.approx(5.4 / 20)


def test_figures_weigh_runs_by_their_tokens_passes_and_time(make_run: MakeRun) -> None:
    runs = [
        make_run(question_id=1, equal=True),
        make_run(
            question_id=2, emitted=2, passes=2, steps=2, accepted_per_pass={0: 2}, offered_depth={1: 2},
            milliseconds=times(20.0), wall_ms=30.0, first_token_ms=10.0, context_tokens=2.0, equal=False,
        ),
    ]  # fmt: skip
    found = figures(runs, None, ROOFLINE)
    assert (found.speedup, found.end_to_end_speedup) == (None, None)
    assert found.decode_tokens_per_s == pytest.approx(10 / 0.12)
    assert found.end_to_end_tokens_per_s == pytest.approx(10 / 0.15)
    assert found.tau == pytest.approx(10 / 6)
    assert found.acceptance_by_depth == [pytest.approx(3 / 6), 0.25, 0.0]
    assert found.milliseconds_per_pass["target"] == pytest.approx(100 / 6)
    assert found.first_token_ms == 25.0
    assert (found.equal_runs, found.differing_runs) == (1, 1)
    context = (4 * 14.0 + 2 * 2.0) / 6
    assert found.roofline_fraction == pytest.approx((4 + 0.1 * context) / (100 / 6))


def test_batched_run_counts_rows_for_tau_and_steps_for_time(make_run: MakeRun) -> None:
    found = figures([make_run(passes=6, steps=4)], None, ROOFLINE)
    assert found.tau == pytest.approx(8 / 6)
    assert found.milliseconds_per_pass["target"] == 20.0


def test_ratios_pair_a_question_with_itself_in_the_same_repeat(make_run: MakeRun) -> None:
    plain = [
        make_run("none", 1, repeat=0, milliseconds=times(100.0)),
        make_run("none", 1, repeat=1, milliseconds=times(300.0)),
        make_run("none", 2, repeat=0, milliseconds=times(50.0)),
    ]
    ours = [
        make_run(question_id=1, repeat=0, milliseconds=times(50.0)),
        make_run(question_id=1, repeat=1, milliseconds=times(100.0)),
        make_run(question_id=2, repeat=1, milliseconds=times(1.0)),  # plain decoding has no such run
    ]
    assert paired_ratios(ours, plain, decode) == {(1,): [2.0, 3.0]}


def test_turns_of_a_question_count_together_where_both_have_them(make_run: MakeRun) -> None:
    plain = [make_run("none", turn=turn, emitted=10, milliseconds=times(100.0)) for turn in (1, 2)]
    ours = [
        make_run(turn=1, emitted=10, milliseconds=times(25.0)),
        make_run(turn=2, emitted=5, milliseconds=times(50.0)),
    ]
    assert paired_ratios(ours, plain, decode) == {(1,): [pytest.approx((15 / 75) / (20 / 200))]}
    assert paired_ratios(ours[:1], plain, decode) == {(1,): [4.0]}


def test_bootstrap_moves_a_questions_repeats_together() -> None:
    found = bootstrap({(1,): [1.0, 1.0, 1.0], (2,): [3.0, 3.0, 3.0]})
    # Of two questions drawn with replacement both are the first, or the second, in a quarter of the cases each.
    assert found == Interval(2.0, 1.0, 3.0)


def test_bootstrap_is_seeded_and_narrows_with_questions() -> None:
    few, many = ({(i,): [1.0 + i % 7 / 10] for i in range(count)} for count in (7, 700))
    assert bootstrap(few, seed=3) == bootstrap(few, seed=3)
    wide, narrow = bootstrap(few), bootstrap(many)
    assert wide is not None
    assert narrow is not None
    assert narrow.median == pytest.approx(1.3)
    assert wide.low <= narrow.low <= narrow.median <= narrow.high <= wide.high
    assert narrow.high - narrow.low < wide.high - wide.low


def test_median_is_of_all_repeats_and_missing_ones_do_not_count() -> None:
    found = bootstrap({(1,): [1.0, 2.0], (2,): [6.0]})
    assert found is not None
    assert found.median == 2.0
    assert bootstrap({}) is None


def test_summary_has_every_category_and_plain_decoding_first(make_run: MakeRun) -> None:
    runs = [make_run(d, q, category=c) for q, c in ((1, "math"), (2, "coding")) for d in ("a", "none", "b")]
    found = summarise(runs, ROOFLINE)
    assert list(found.categories) == ["math", "coding"]
    assert [list(by_label) for by_label in (found.overall, *found.categories.values())] == [["none", "a", "b"]] * 3
    assert found.overall["a"].num_runs == 2
    assert found.categories["math"]["a"].num_runs == 1


def test_figures_need_a_run() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        figures([], None, ROOFLINE)


def test_weights_leave_out_an_untied_embedding_and_count_a_tied_one_once(target: HFTarget) -> None:
    model = target.model
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    every = sum(p.nbytes for p in model.parameters()) + buffers
    table = model.get_input_embeddings().weight.nbytes
    assert weight_bytes(model) == every - table
    config = model.config
    config.tie_word_embeddings = True
    tied = LlamaForCausalLM(config)
    assert tied.get_input_embeddings().weight is tied.get_output_embeddings().weight
    assert weight_bytes(tied) == sum(p.nbytes for p in tied.parameters()) + buffers == every - table


def test_roofline_is_measured(target: HFTarget) -> None:
    assert kv_bytes_per_token(target) == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    assert 0.1 < measure_bandwidth(torch.device("cpu"), 1, repeats=1) < 10_000
    curve = latency_curve(target, repeats=1)
    assert [nodes for nodes, _ in curve] == [1, 4, 8, 16, 32, 64]
    assert all(ms > 0 for _, ms in curve)


def test_categories_below_the_floor_are_named_slowest_first(make_run: MakeRun) -> None:
    runs = [
        make_run(label, question_id=question, question_ids=(question,), category=category, milliseconds=times(ms))
        for category, question, plain in (("math", 1, 96.0), ("coding", 2, 50.0), ("stem", 3, 97.0))
        for label, ms in (("none", plain), ("ngram", 100.0))
    ]  # fmt: skip
    floor = summarise(runs, ROOFLINE).floor
    assert floor is not None
    assert not floor.met
    assert [(label, category) for label, category, _ in floor.below] == [("ngram", "coding"), ("ngram", "math")]
    assert floor_text(floor) == (
        "slower than 0.97 times plain decoding: ngram in coding 0.50 [0.50, 0.50], ngram in math 0.96 [0.96, 0.96]"
    )
    noisy = CategoryFloor(0.97, [("ngram", "math", Interval(0.96, 0.9, 0.99))])
    assert floor_text(noisy).endswith("[0.90, 0.99] (may be noise)")


def test_a_floor_that_is_met_or_was_not_asked_for(make_run: MakeRun) -> None:
    floor = summarise([make_run("none"), make_run("ngram")], ROOFLINE).floor
    assert floor is not None
    assert floor.met
    assert floor_text(floor).startswith("every category of every drafter is at least 0.97 times")
    assert summarise([make_run("none")], ROOFLINE).floor is None
    assert Summary.from_json({"overall": {}, "categories": {}, "latency_curve": []}).floor is None

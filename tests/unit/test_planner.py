"""Budgets on hand-made curves, what passes teach of their cost, and curves on disk."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from integration.architectures import tiny_model

from specdec import latency
from specdec.kernels import build
from specdec.kernels.decoder_layer import SOURCE
from specdec.kv_cache import KVCache
from specdec.latency import LatencyCurve, LatencyKey, load_curve, measure_curve, save_curve
from specdec.planner import CAUTIOUS_CPU, Budget, PassTimes, best_budget
from specdec.target import HFTarget
from specdec.tree import TokenTree

SIZES = (1, 2, 4, 8, 16, 32)


def growing(nodes: int) -> float:
    """A drafter of use: one token more per doubling."""
    return 1.0 + math.log2(nodes)


def free(nodes: int) -> float:
    return 0.0


# The best budget


def test_where_width_is_free_the_largest_tree_is_best() -> None:
    assert best_budget(SIZES, growing, lambda n: 10.0, free) == Budget(32, 6.0)


def test_where_time_grows_with_width_no_tree_pays() -> None:
    assert best_budget(SIZES, growing, lambda n: 10.0 * n**1.2, free) == Budget(1, 1.0)


def test_a_step_in_the_curve_is_not_climbed() -> None:
    step = {1: 10.0, 2: 10.5, 4: 11.0, 8: 11.5, 16: 30.0, 32: 31.0}
    assert best_budget(SIZES, growing, step.__getitem__, free) == Budget(8, pytest.approx(4.0 * 10.0 / 11.5))


def test_a_dear_drafter_wants_larger_trees_or_none() -> None:
    def line(nodes: int) -> float:
        return 10.0 + nodes

    sizes = [best_budget(SIZES, growing, line, lambda n, ms=ms: ms).nodes for ms in (0.0, 20.0, 200.0)]  # type: ignore[misc]
    assert sizes[0] < sizes[1]
    assert sizes[2] == 1


def test_plain_decoding_drafts_nothing_and_wins_a_draw() -> None:
    assert best_budget((1, 2), lambda n: float(n), lambda n: 10.0 * n, free).nodes == 1
    assert best_budget((2,), lambda n: 1.0, lambda n: 10.0, lambda n: 5.0) == Budget(1, 1.0)


def test_of_equal_sizes_the_smallest_is_taken() -> None:
    assert best_budget(SIZES, lambda n: 2.0, lambda n: 10.0, free).nodes == 2


@pytest.mark.parametrize("ms", [0.0, -1.0, math.nan, math.inf])
def test_times_that_are_none_are_refused(ms: float) -> None:
    with pytest.raises(ValueError, match="times are positive"):
        best_budget((1, 4), growing, lambda n: ms if n == 4 else 1.0, free)


# Curves


def test_a_curve_is_linear_between_its_points_and_beyond_them() -> None:
    curve = LatencyCurve((1, 4), (100, 300), (1, 2), (((10.0, 16.0), (30.0, 36.0)), ((20.0, 26.0), (40.0, 46.0))))
    assert curve.at(1, 1, 100) == 10.0
    assert curve.at(2, 1, 100) == pytest.approx(12.0)
    assert curve.at(2, 1, 200) == pytest.approx(22.0)
    assert curve.at(2, 1.5, 200) == pytest.approx(27.0)
    assert curve.at(6, 1, 100) == pytest.approx(20.0)
    assert curve.at(1, 1, 0) == 10.0


def test_a_curve_never_falls_beyond_its_last_point() -> None:
    assert LatencyCurve.simple({1: 10.0, 2: 9.0}).at(50) == 9.0


def test_a_curve_of_one_batch_size_counts_rows() -> None:
    curve = LatencyCurve.simple({1: 10.0, 8: 17.0})
    assert curve.at(2, batch=4) == curve.at(8) == 17.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nodes": (4, 1)}, "nodes must ascend"),
        ({"batches": (0,)}, "batches must ascend from at least 1"),
        ({"lengths": ()}, "lengths must ascend"),
        ({"milliseconds": (((1.0,),),)}, r"milliseconds must be \[1\]\[1\]\[2\]"),
        ({"milliseconds": (((1.0, -2.0),),)}, "positive number of milliseconds, got -2.0"),
    ],
)
def test_a_curve_that_is_none_is_refused(values: dict[str, tuple[int, ...]], message: str) -> None:
    good = {"nodes": (1, 4), "lengths": (0,), "batches": (1,), "milliseconds": (((1.0, 2.0),),)}
    with pytest.raises(ValueError, match=message):
        LatencyCurve(**{**good, **values})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny_model())


def test_a_measured_curve_has_every_combination_and_survives_the_disk(target: HFTarget, tmp_path: Path) -> None:
    curve = measure_curve(target, nodes=(1, 2, 5), lengths=(1, 7), batches=(1, 3), rounds=2)
    assert (curve.nodes, curve.lengths, curve.batches) == ((1, 2, 5), (1, 7), (1, 3))
    key = LatencyKey.of(target)
    assert load_curve(key, tmp_path) is None
    path = save_curve(curve, key, tmp_path / "new folder")
    assert load_curve(key, tmp_path / "new folder") == curve
    assert json.loads(path.read_text())["key"]["precision"] == "float32"


def test_a_measurement_without_time_has_one_round_to_warm_up_and_one_that_counts(
    target: HFTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[tuple[int, int]] = []

    def fake(target: HFTarget, tree: TokenTree, cache: KVCache) -> float:
        passes.append((cache.batch_size, tree.num_nodes))
        return float(len(passes))

    monkeypatch.setattr(latency, "_pass_ms", fake)
    curve = measure_curve(target, nodes=(1, 2), lengths=(1, 7), batches=(1, 3), seconds=0)
    a_round = [(batch, nodes) for batch in (1, 3) for _ in (1, 7) for nodes in (1, 2)]
    assert passes == 2 * a_round
    assert curve.milliseconds == (((9, 10), (11, 12)), ((13, 14), (15, 16)))


def test_a_measurement_does_not_mind_a_machine_that_is_disturbed_half_of_the_time(
    target: HFTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = iter(range(1000))

    def fake(target: HFTarget, tree: TokenTree, cache: KVCache) -> float:
        return 10.0 + tree.num_nodes + (9.0 if next(passes) // 2 % 2 else 0.0)  # every other round

    monkeypatch.setattr(latency, "_pass_ms", fake)
    curve = measure_curve(target, nodes=(1, 8), lengths=(1,), batches=(1,), rounds=7)
    assert curve.milliseconds == (((11.0, 18.0),),)


@pytest.mark.parametrize(("slow", "rounds"), [(1.0, 8), (6.0, 4), (19.0, 2), (30.0, 2)])
def test_a_measurement_ends_with_the_round_that_runs_out_of_time(
    target: HFTarget, monkeypatch: pytest.MonkeyPatch, slow: float, rounds: int
) -> None:
    """Rounds of so many seconds, out of 20: one that begins in time is finished."""
    now = [0.0]

    def fake(target: HFTarget, tree: TokenTree, cache: KVCache) -> float:
        now[0] += slow
        return 1.0

    monkeypatch.setattr(latency, "_pass_ms", fake)
    monkeypatch.setattr(latency, "perf_counter", lambda: now[0])
    measure_curve(target, nodes=(1,), lengths=(1,), batches=(1,))
    assert now[0] == rounds * slow


def test_a_measurement_stays_within_the_models_context() -> None:
    limited = HFTarget(tiny_model(max_position_embeddings=12))
    curve = measure_curve(limited, nodes=(1, 8, 64), lengths=(2, 500), batches=(1,), rounds=1)
    assert (curve.nodes, curve.lengths) == ((1, 8), (2, 4))


def test_a_curve_of_another_machine_model_or_precision_is_not_found(
    target: HFTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = LatencyKey.of(target)
    assert LatencyKey.of(target) == key
    curve = LatencyCurve.simple({1: 1.0})
    path = save_curve(curve, key, tmp_path)
    for change in ({"threads": key.threads + 1}, {"device": "another"}, {"torch": "0"}, {"precision": "bfloat16"}):
        assert load_curve(replace(key, **change), tmp_path) is None  # type: ignore[arg-type]
    assert LatencyKey.of(HFTarget(tiny_model(seed=5))) != key
    assert LatencyKey.of(HFTarget(tiny_model().to(torch.bfloat16))) != key
    with monkeypatch.context() as patch:  # another machine whose processor goes by the same name
        patch.setattr(build, "_processor", lambda: b"model name : Xeon\nflags : amx_bf16")
        assert load_curve(LatencyKey.of(target), tmp_path) is None
    for file in SOURCE.parent.glob("*.[ch]"):
        folder = tmp_path / file.stem
        shutil.copytree(SOURCE.parent, folder)
        (folder / file.name).write_text(file.read_text() + "\n")
        monkeypatch.setattr(latency, "SOURCE", folder / SOURCE.name)
        assert load_curve(LatencyKey.of(target), tmp_path) is None, file
    for damage in ("", "[]", '{"format": 1}', path.read_text().replace("1.0", '"soon"')):
        path.write_text(damage)
        assert load_curve(key, tmp_path) is None


# What passes cost


def test_one_pass_gives_a_cautious_curve_its_scale() -> None:
    times = PassTimes(CAUTIOUS_CPU)
    assert not times.known
    times.observe(16, 1, 100, 44.0)
    assert times.estimate(16, 1, 100) == pytest.approx(44.0)
    assert times.estimate(1, 1, 100) == pytest.approx(44.0 / CAUTIOUS_CPU.at(16))
    assert not times.knows(1, 1)


def test_passes_of_two_widths_correct_the_shape_between_them() -> None:
    times = PassTimes(LatencyCurve.simple({1: 1.0, 64: 1.0}))
    times.observe(1, 1, 0, 10.0)
    times.observe(16, 1, 0, 30.0)
    assert times.estimate(4, 1, 0) == pytest.approx(20.0)  # half way, in doublings
    assert times.estimate(64, 1, 0) == pytest.approx(30.0)


def test_rows_of_a_batch_count_as_nodes() -> None:
    times = PassTimes(CAUTIOUS_CPU)
    times.observe(2, 4, 0, 33.0)
    assert times.estimate(8, 1, 0) == pytest.approx(33.0)
    assert times.knows(1, 8)


def test_a_slow_first_pass_and_one_stall_are_not_believed() -> None:
    times = PassTimes(CAUTIOUS_CPU)
    for ms in (90.0, 10.0, 10.5, 50.0, 9.5):
        times.observe(1, 1, 0, ms)
    assert times.estimate(1, 1, 0) == 10.5


def test_a_given_curve_is_not_corrected() -> None:
    times = PassTimes(LatencyCurve.simple({1: 10.0, 8: 20.0}), learn=False)
    times.observe(1, 1, 0, 500.0)
    assert times.estimate(1, 1, 0) == 10.0
    assert times.knows(8, 1)

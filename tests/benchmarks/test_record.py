"""Files are there whole or not at all, and an interrupted run's journal is read for what it is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from specdec.benchmarks import record
from specdec.benchmarks.record import Journal
from specdec.benchmarks.roofline import Roofline
from specdec.benchmarks.schema import BenchResult, Difference, Run
from specdec.benchmarks.summary import summarise

HEADER = {"settings": {"seed": 0, "drafters": [{"name": "ngram"}]}, "questions": {"sha256": "ab"}}


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    journal = Journal(tmp_path / "out.json", HEADER)
    journal.start()
    journal.append([{"run": 1}, {"run": 2}])
    return journal


def test_journal_stands_beside_the_result(journal: Journal) -> None:
    assert journal.path.name == "out.json.partial.jsonl"
    assert journal.read() == [{"run": 1}, {"run": 2}]
    journal.remove()
    assert not journal.path.exists()


def test_an_interrupted_run_is_gone_on_with_only_where_that_was_asked_for(journal: Journal, tmp_path: Path) -> None:
    assert record.interrupted(journal, True) == [{"run": 1}, {"run": 2}]
    with pytest.raises(ValueError, match=r"partial\.jsonl holds an interrupted run: resume it, or delete that file"):
        record.interrupted(journal, False)
    assert record.interrupted(Journal(tmp_path / "other.json", HEADER), True) == []
    assert record.interrupted(None, False) == []
    with pytest.raises(ValueError, match="nothing to resume without a file"):
        record.interrupted(None, True)


@pytest.mark.parametrize("torn", [b'{"run"', b'{"run": 3}', b'{"run": \n'])
def test_torn_last_line_is_left_out(journal: Journal, torn: bytes) -> None:
    with journal.path.open("ab") as file:
        file.write(torn)
    assert journal.read() == [{"run": 1}, {"run": 2}]


def test_torn_header_is_an_empty_journal(journal: Journal) -> None:
    journal.path.write_bytes(b'{"settings": {"se')
    assert journal.read() == []


def test_malformed_line_inside_is_named(journal: Journal) -> None:
    lines = journal.path.read_text().splitlines()
    journal.path.write_text("\n".join([lines[0], "{", *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"out\.json\.partial\.jsonl, line 2 is malformed"):
        journal.read()


def test_journal_of_other_settings_is_refused_naming_them(journal: Journal, tmp_path: Path) -> None:
    changed = {"settings": {"seed": 1, "drafters": [{"name": "ngram"}]}, "questions": {"sha256": "cd"}}
    with pytest.raises(ValueError, match="cannot be resumed") as error:
        Journal(tmp_path / "out.json", changed).read()
    assert "settings.seed: 0 before, 1 now" in str(error.value)
    assert "questions.sha256: 'ab' before, 'cd' now" in str(error.value)
    assert "drafters" not in str(error.value)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    record.write_json(path, {"old": 1})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        record.write_json(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_not_a_number_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        record.write_json(tmp_path / "out.json", {"x": float("nan")})


def test_result_survives_the_way_through_json(make_run: Callable[..., Run]) -> None:
    difference = Difference(1, 3, 7, None, None, 0.5, True)
    runs = [make_run("none"), make_run(equal=False, difference=difference)]
    result = BenchResult(
        kind="mt-bench", date="2026-01-01T00:00:00+00:00", command=["specdec"], commit=None, machine={"gpu": None},
        versions={"triton": None}, settings={"seed": 0}, questions={"count": 1}, bandwidth_gb_s=10.0, weight_bytes=5,
        kv_bytes_per_token=2, runs=runs, summary=summarise(runs, Roofline(10.0, 5, 2)),
    )  # fmt: skip
    document = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert document["schema"] == 1
    assert BenchResult.from_json(document) == result
    with pytest.raises(ValueError, match="schema 1 is needed, got 2"):
        BenchResult.from_json(document | {"schema": 2})
    with pytest.raises(ValueError, match=r"BenchResult: missing fields \['runs'\], unknown fields \['rums'\]"):
        BenchResult.from_json({("rums" if name == "runs" else name): value for name, value in document.items()})


def test_machine_and_versions_are_recorded() -> None:
    machine = record.machine(torch.device("cpu"))
    assert machine["threads"] == torch.get_num_threads()
    assert machine["gpu"] is None
    assert machine["cores"] >= 1
    assert set(machine["flags"]) <= set(record.CPU_FLAGS)
    assert {"python", "torch", "transformers", "specdec", "triton"} == set(record.versions())
    assert record.peak_memory_bytes(torch.device("cpu")) > 2**20


def test_commit_outside_a_checkout_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import specdec

    (tmp_path / "specdec.py").touch()
    monkeypatch.setattr(specdec, "__file__", str(tmp_path / "specdec.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.commit() is None

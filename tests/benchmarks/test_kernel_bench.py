"""``specdec bench kernels``: wrong results are not timed, contenders may be missing, and a CPU publishes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from specdec.benchmarks import kernels
from specdec.benchmarks.kernel_cases import OPERATIONS
from specdec.benchmarks.kernels import Cases, KernelCase, disagreement, run_kernels
from specdec.cli import main

CPU = torch.device("cpu")


def doubling(calls: list[str], ours: Callable[[Tensor], Tensor] = lambda x: 2 * x, **contenders: Any) -> Cases:
    """An operation that doubles, and notes its calls."""

    def named(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Callable[[], Tensor]]:
        def bind(x: Tensor) -> Callable[[], Tensor]:
            def call() -> Tensor:
                calls.append(name)
                return function(x)

            return call

        return bind

    case = KernelCase(
        {"size": 4},
        lambda seed: torch.full((4,), float(seed + 1)),
        named("ours", ours),
        num_bytes=32,
        contenders={name: named(name, function) for name, function in contenders.items()},
        expected=lambda x: x + x,
    )
    return lambda device, small: [case]


def fail(error: Exception) -> Callable[[Tensor], Tensor]:
    def raise_(_: Tensor) -> Tensor:
        raise error

    return raise_


@pytest.mark.parametrize(
    ("got", "expected", "agree"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 2e-7]), True),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0 + 2e-5]), False),
        (torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([1.0, 2.01]), True),
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), False),
        (torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 2.0]]), False),
        (torch.tensor([1, 2]), torch.tensor([1, 2]), True),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), False),
    ],
)
def test_what_agrees(got: Tensor, expected: Tensor, agree: bool) -> None:
    assert (disagreement(got, expected) is None) == agree


def test_a_wrong_result_stops_everything_before_anything_is_timed() -> None:
    calls: list[str] = []
    operations = {"wrong": doubling(calls, ours=lambda x: 3 * x), "right": doubling(calls)}
    with pytest.raises(RuntimeError, match=r"wrong \(size 4\) is wrong: off by 1"):
        run_kernels(CPU, operations, seconds=0.0)
    assert calls == ["ours"]


def test_figures_stand_beside_their_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "copy_bandwidth", lambda _: 32e6)  # 32 bytes take a microsecond
    monkeypatch.setattr(kernels, "matmul_rate", lambda _: 1.0)
    times = iter(float(t) for t in range(1, 100))
    monkeypatch.setattr(kernels, "sampler", lambda *_: kernels.Sampler(lambda: next(times), "clock"))
    result = run_kernels(CPU, {"double": doubling([], twice=lambda x: x + x)}, seconds=0.0)
    case = result["cases"][0]
    assert case["floor_us"] == 1.0
    assert (case["operation"], case["shape"], case["buffers"]) == ("double", {"size": 4}, 2)
    ours, other = (case["results"][name] for name in ("specdec", "twice"))
    assert (ours["median_us"], other["median_us"], ours["samples"]) == (5.0, 6.0, 5)  # by turns
    assert ours["of_floor"] == 1.0 / 5.0


def test_contenders_that_cannot_run_or_differ_are_named() -> None:
    operations = {
        "double": doubling(
            [], absent=fail(ImportError("not there")), full=fail(torch.OutOfMemoryError("no room")),
            other=lambda x: 3 * x,
        )
    }  # fmt: skip
    results = run_kernels(CPU, operations, seconds=0.0)["cases"][0]["results"]
    assert results["absent"] == {"unavailable": "ImportError: not there"}
    assert results["full"] == {"unavailable": "OutOfMemoryError: no room"}
    assert results["other"] == {"differs": "off by 1, 9.54e-07 is allowed"}
    assert results["specdec"]["median_us"] > 0.0


def test_a_case_too_large_for_the_device_is_left_out() -> None:
    attempts: list[str] = []

    def second_time(x: Tensor) -> Tensor:
        if len(attempts) > 1:
            raise torch.OutOfMemoryError("no room")
        return 2 * x

    results = run_kernels(CPU, {"double": doubling(attempts, ours=second_time)}, seconds=0.0)["cases"][0]["results"]
    assert results == {"specdec": {"unavailable": "OutOfMemoryError: no room"}}


def test_every_operation_runs_on_the_cpu_and_is_not_for_publication(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    run = CliRunner().invoke(main, ["bench", "kernels", "--device", "cpu", "--seconds", "0", "--json", str(path)])
    assert run.exit_code == 0, run.output
    assert run.stdout.startswith("No CUDA device: these are the CPU paths at small sizes.")
    result = json.loads(path.read_text())
    assert result["publishable"] is False
    assert result["note"] == kernels.CPU_NOTE
    assert {case["operation"] for case in result["cases"]} == set(OPERATIONS)
    for case in result["cases"]:
        assert case["results"]["specdec"]["samples"] == 5
        assert all("median_us" in found for found in case["results"].values())


def test_bad_input_is_named(tmp_path: Path) -> None:
    run = CliRunner().invoke(main, ["bench", "kernels", "--op", "tree_atention"])
    assert run.exit_code == 2
    assert "did you mean 'tree_attention'" in run.output
    run = CliRunner().invoke(main, ["bench", "kernels", "--json", str(tmp_path / "no" / "out.json")])
    assert run.exit_code == 2
    assert "there is no folder" in run.output

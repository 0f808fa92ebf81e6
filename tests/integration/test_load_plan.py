"""What loading takes is known from headers, as measured in other processes; what does not fit is refused unread."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from integration.architectures import tiny_model
from specdec import SpecDecoder, models
from specdec.call_memory import plan_before_load
from specdec.load_plan import SHORT, LoadPlan, check_load, plan_load, read_headers
from specdec.memory_plan import MemoryPlan, Workload, estimate
from specdec.model_shape import ModelShape
from specdec.models import load_model, plan_model
from specdec.packing import cpu_takes_bfloat16
from specdec.quantization import usable
from specdec.registry import create_drafter
from specdec.target import HFTarget

SLACK = 6 * 2**20
"""Tokenizer and kernels' code, in a process that loaded a small model before."""

RETURNS = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}
"""The plan counts what is in use. glibc raises this threshold as blocks are freed, and then by chance keeps up to 6 MB:
much beside a model of 22 MB, nothing beside a real one."""

MEASURE = """
import re, sys
from specdec.models import load_model
from specdec.target import HFTarget

def resident(name):
    return 1024 * int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

def load(folder):
    target = HFTarget(load_model(folder, dtype=sys.argv[3], packed=True, quantize=sys.argv[4] or None).model)
    sum(float(tensor.flatten()[::512].float().sum()) for tensor in target.model.parameters())  # maps every page

load(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = resident("VmRSS")
load(sys.argv[2])
print(resident("VmHWM") - before)
"""

CASES = [("fp32", "fp32", ""), ("fp32", "bf16", ""), ("bf16", "bf16", "w8a8")]
"""Type in the file, type asked for, quantization."""


def bf16_runs() -> bool:
    return cpu_takes_bfloat16() and "w8a8" in usable(torch.device("cpu"), torch.bfloat16)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of 45 MB in float32, whose head is its embedding, in two dtypes; and a small one."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("models")
    config = LlamaConfig(
        vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=5, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(root / "fp32")
    model.to(torch.bfloat16).save_pretrained(root / "bf16")
    tiny_model().save_pretrained(root / "small")
    return {path.name: path for path in root.iterdir()}


def plan_of(folder: Path, dtype: str, quantize: str = "") -> LoadPlan:
    what = models.DTYPES[dtype]
    plan = plan_load(folder, what, lays_out=what == torch.bfloat16, quantize=quantize or None)
    assert plan is not None
    return plan


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux's /proc")
@pytest.mark.skipif(not bf16_runs(), reason="this CPU does not compute in bfloat16 and int8")
def test_the_plan_is_within_ten_percent_of_the_measured_peak(folders: dict[str, Path]) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURE, str(folders["small"]), str(folders[stored]), dtype, quantize],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **RETURNS},
        )
        for stored, dtype, quantize in CASES
    ]
    peaks = [int(process.communicate(timeout=120)[0]) for process in running]
    for (stored, dtype, quantize), peak in zip(CASES, peaks, strict=True):
        plan = plan_of(folders[stored], dtype, quantize)
        assert plan.peak == pytest.approx(peak, rel=0.1, abs=SLACK), (stored, dtype, quantize, plan, peak)


@pytest.mark.parametrize(
    ("stored", "dtype", "quantize"),
    [*CASES, ("bf16", "bf16", ""), ("bf16", "fp32", ""), ("bf16", "bf16", "int8"), ("bf16", "bf16", "int4")],
)
def test_what_stays_is_what_the_loaded_model_holds(
    folders: dict[str, Path], stored: str, dtype: str, quantize: str
) -> None:
    if dtype == "bf16" and not bf16_runs():
        pytest.skip("this CPU does not compute in bfloat16 and int8")
    plan = plan_of(folders[stored], dtype, quantize)
    loaded = load_model(str(folders[stored]), dtype=dtype, packed=True, quantize=quantize or None).model
    shape = ModelShape.of(HFTarget(loaded))
    assert plan.shape.weights == pytest.approx(shape.weights, rel=0.02)
    assert plan.shape == ModelShape(**{**vars(shape), "weights": plan.shape.weights, "compiled": False})


def test_headers_are_read_and_nothing_else(folders: dict[str, Path]) -> None:
    exact = {k: (v.dtype, tuple(v.shape)) for k, v in tiny_model().state_dict().items()}
    found = read_headers(folders["small"])
    assert found
    assert all(exact[name] == value for name, value in found.items())


def shard(folder: Path, header: bytes) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(header)
    return folder


@pytest.mark.parametrize("header", [b"", b"\x05", (2**40).to_bytes(8, "little"), (3).to_bytes(8, "little") + b"{x}"])
def test_damaged_headers_are_named(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(ValueError, match=r"the header of .*model\.safetensors cannot be read"):
        read_headers(shard(tmp_path / "m", header))


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(models, "_load", fail)
    held = plan_of(folders["fp32"], "fp32").held
    with pytest.raises(
        ValueError, match=r"are needed to load the model and 20 MiB may be used: weights \d.* as loaded"
    ):
        SpecDecoder(str(folders["fp32"]), "none", memory_budget="20MiB", dtype="fp32")
    least = estimate(plan_of(folders["fp32"], "fp32").shape, 0, SHORT, 1, 1)
    said = rf"are needed and .* may be used: {re.escape(least.describe())}\. Give more memory, shorten"
    for budget in (held, least.total - 1):  # it fits, and no call does
        with pytest.raises(ValueError, match=said):
            load_model(str(folders["fp32"]), dtype="fp32", memory_budget=budget)
    with pytest.raises(AssertionError, match="weights were read"):
        load_model(str(folders["fp32"]), dtype="fp32", memory_budget=least.total)
    monkeypatch.setattr("specdec.memory.free_bytes", lambda device: 2**20)
    with pytest.raises(ValueError, match="1 MiB may be used"):
        load_model(str(folders["fp32"]), dtype="fp32")


def test_before_loading_trees_shrink_and_then_the_batch(folders: dict[str, Path]) -> None:
    load, work = plan_of(folders["fp32"], "fp32"), Workload(rows=8, prompt_len=100, max_len=200, nodes=64)
    whole = check_load(load, None, 0, work)
    assert (whole.rows, whole.nodes) == (8, 64)
    smaller = check_load(load, whole.total - 1, 0, work)
    assert smaller.rows == 8
    assert smaller.nodes < 64
    least = min(estimate(load.shape, 0, work, 8, nodes).total for nodes in range(1, 65))
    fewer = check_load(load, least - 1, 0, work)
    assert fewer.rows == 4


def test_what_has_no_headers_is_not_planned(tmp_path: Path, folders: dict[str, Path]) -> None:
    assert plan_load(tmp_path / "model.gguf") is None
    assert plan_load(tmp_path) is None
    with pytest.raises(ValueError, match="unknown quantization 'int9'"):
        plan_load(folders["small"], quantize="int9")
    config = json.loads((folders["small"] / "config.json").read_text())
    assert "quantization_config" not in config


# The plan of a call


def rows_apart(rows: int, length: int) -> list[list[int]]:
    """Prompts that share nothing."""
    return [[row + 1] + [3] * (length - 1) for row in range(rows)]


def of_the_call(plan: MemoryPlan | None) -> MemoryPlan:
    """All but the weights, which headers say to within 2 %."""
    assert plan is not None
    return replace(plan, weights=0)


@pytest.mark.parametrize(
    ("stored", "dtype", "quantize", "kv", "drafter"),
    [
        ("fp32", "fp32", None, None, "none"),
        ("fp32", "fp32", None, "int4", "ngram"),
        ("bf16", "bf16", None, None, "suffix"),
        ("bf16", "bf16", None, "int8", "suffix"),
        ("bf16", "auto", None, None, "lookahead"),
        ("fp32", "auto", "int8", None, "suffix"),
        ("bf16", "bf16", "int4", None, "none"),
        ("bf16", "auto", "fp6", None, "suffix"),
    ],
)
def test_a_call_is_planned_as_the_loaded_decoder_plans_it(
    folders: dict[str, Path], stored: str, dtype: str, quantize: str | None, kv: str | None, drafter: str
) -> None:
    if (dtype, quantize) != ("fp32", None) and not bf16_runs():
        pytest.skip("this CPU does not compute in bfloat16 and int8")
    folder = str(folders[stored])
    load = plan_model(folder, dtype=dtype, device="cpu", packed=True, quantize=quantize)
    assert load is not None
    decoder = SpecDecoder(folder, drafter, dtype=dtype, device="cpu", quantize=quantize, kv=kv)
    kv_bits = decoder.target.kv_bits
    for rows, length, new, temperature in ((1, 40, 9, 0.0), (5, 300, 70, 0.0), (3, 90, 5, 0.8)):
        decoder.stream(rows_apart(rows, length), max_new_tokens=new, temperature=temperature, seed=1).close()
        found = plan_before_load(
            load, create_drafter(drafter), None, rows=rows, prompt_len=length, new_tokens=new,
            sampled=temperature > 0, kv_bits=kv_bits,
        )  # fmt: skip
        assert of_the_call(found) == of_the_call(decoder.memory_plan)
        assert decoder.memory_plan is not None
        assert found.weights == pytest.approx(decoder.memory_plan.weights, rel=0.02)


def test_a_call_shrinks_before_loading_as_afterwards(folders: dict[str, Path]) -> None:
    """Trees first, then the batch, then it is refused with the numbers."""
    folder, drafter = str(folders["fp32"]), create_drafter("suffix")
    load = plan_model(folder, dtype="fp32", device="cpu", packed=True)
    assert load is not None
    asked: dict[str, Any] = {"rows": 8, "prompt_len": 100, "new_tokens": 50}
    whole = plan_before_load(load, drafter, None, **asked)
    assert whole.rows == 8
    assert whole.nodes > 1
    budgets = [whole.total - 1, load.shape.weights + whole.working // 2]
    smaller, fewer = (plan_before_load(load, drafter, budget, **asked) for budget in budgets)
    assert smaller.rows == 8
    assert smaller.nodes < whole.nodes
    assert fewer.rows < 8
    decoder = SpecDecoder(folder, drafter, dtype="fp32", device="cpu", memory_budget=budgets[1])
    decoder.stream(rows_apart(8, 100), max_new_tokens=50).close()
    assert of_the_call(decoder.memory_plan) == of_the_call(fewer)
    budget = load.held + 2**16
    with pytest.raises(
        ValueError, match=r"are needed and .* may be used: weights .* for 1 rows of 1 nodes\. Give more"
    ):
        plan_before_load(load, drafter, budget, **asked)


def test_a_call_that_cannot_be_is_refused(folders: dict[str, Path]) -> None:
    load, drafter = plan_of(folders["fp32"], "fp32"), create_drafter("none")
    assert load.max_context == 2048
    assert plan_before_load(load, drafter, None, prompt_len=2000, new_tokens=100) == plan_before_load(
        load, drafter, None, prompt_len=2000, new_tokens=48
    )
    with pytest.raises(ValueError, match="the prompt has 2048 tokens, the model's context only 2048: shorten it"):
        plan_before_load(load, drafter, None, prompt_len=2048)
    numbers: list[dict[str, Any]] = [{"rows": 0}, {"prompt_len": 0}, {"new_tokens": 0}]
    for wrong in numbers:
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1, got 0"):
            plan_before_load(load, drafter, None, **wrong)


def test_planning_says_what_loading_would(tmp_path: Path, folders: dict[str, Path]) -> None:
    for wrong in ({"dtype": "int3"}, {"quantize": "int9"}, {"device": "abacus"}):
        with pytest.raises(ValueError, match="unknown"):
            plan_model(str(folders["small"]), **wrong)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert plan_model(str(tmp_path / "m.gguf")) is None

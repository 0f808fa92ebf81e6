"""What loading takes is known from headers, as measured in other processes; what does not fit is refused unread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from integration.architectures import tiny_model
from specdec import SpecDecoder, models
from specdec.load_plan import LoadPlan, check_load, plan_load, read_headers
from specdec.memory_plan import Workload, estimate
from specdec.model_shape import ModelShape
from specdec.models import load_model
from specdec.packing import cpu_takes_bfloat16
from specdec.quantization import usable
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
    with pytest.raises(ValueError, match=r"are needed and .* may be used"):  # it fits, and no call does
        load_model(str(folders["fp32"]), dtype="fp32", memory_budget=held)
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

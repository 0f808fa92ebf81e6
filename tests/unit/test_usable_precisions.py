"""Which precisions a device, a dtype and what is installed allow."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch

from specdec.models import load_model
from specdec.quantization import check_runs, usable

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TORCHAO = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig", "Int4WeightOnlyConfig")


def pretend(monkeypatch: pytest.MonkeyPatch, *there: str, parts: tuple[str, ...] = TORCHAO) -> None:
    """Have these of the optional libraries installed, torchao with some parts, and no others."""
    for name in ("torchao", "torchao.quantization", "bitsandbytes", "bitsandbytes.nn"):
        module = types.ModuleType(name) if name.split(".")[0] in there else None
        for part in (*parts, "Linear4bit", "Params4bit") if module else ():
            setattr(module, part, object)
        monkeypatch.setitem(sys.modules, name, module)
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> object:
        return (object() if name in there else None) if name in ("mslk", "fbgemm_gpu") else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)


def pretend_cpu(monkeypatch: pytest.MonkeyPatch, *, vnni: bool, panels: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr("specdec.stored_weights.panels_run", lambda: panels)


@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize(
    ("libraries", "dtype", "expected"),
    [
        ((), torch.bfloat16, ["int4-g128", "fp6"]),
        (("bitsandbytes",), torch.bfloat16, ["int4-g128", "nf4", "fp6"]),
        (("torchao",), torch.bfloat16, ["int8", "w8a8", "int4-g128", "fp6"]),
        (("torchao", "mslk"), torch.bfloat16, ["int8", "w8a8", "int4", "int4-g128", "fp6"]),
        (("torchao", "fbgemm_gpu"), "auto", ["int8", "w8a8", "int4", "int4-g128", "fp6"]),
        (("torchao", "mslk"), torch.float32, ["int8", "w8a8", "int4-g128", "fp6"]),
    ],
)
def test_on_a_gpu_libraries_decide_and_not_the_processor(
    monkeypatch: pytest.MonkeyPatch, libraries: tuple[str, ...], dtype: torch.dtype | str, expected: list[str],
    cpu: bool,
) -> None:  # fmt: skip
    pretend(monkeypatch, *libraries)
    pretend_cpu(monkeypatch, vnni=cpu, panels=cpu)
    assert usable(CUDA, dtype) == expected


@pytest.mark.parametrize(
    ("dtype", "vnni", "panels", "expected"),
    [
        (torch.float32, False, True, ["int8", "int4", "int4-g128", "fp6"]),
        (torch.float32, True, False, ["int8", "w8a8", "int4", "int4-g128", "fp6"]),
        (torch.bfloat16, False, False, ["int8", "int4", "int4-g128", "fp6"]),
        (torch.bfloat16, False, True, ["int8", "w8a8", "int4", "int4-g128", "w4a8", "fp6"]),
        ("auto", False, True, ["int8", "w8a8", "int4", "int4-g128", "w4a8", "fp6"]),
    ],
)
def test_on_a_cpu_its_instructions_and_our_kernels_decide(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | str, vnni: bool, panels: bool, expected: list[str]
) -> None:
    pretend(monkeypatch)
    pretend_cpu(monkeypatch, vnni=vnni, panels=panels)
    assert usable(CPU, dtype) == expected
    pretend(monkeypatch, "bitsandbytes")
    assert set(usable(CPU, dtype)) - set(expected) == {"nf4"}


@pytest.mark.parametrize(
    ("name", "libraries", "message"),
    [
        ("int8", (), r"torchao is needed .*specdec\[torchao\]"),
        ("w8a8", ("old",), "torchao is too old, it has no Int8DynamicActivationInt8WeightConfig"),
        ("int4", ("torchao",), "needs mslk or fbgemm_gpu, which is missing: use 'int4-g128'"),
        ("nf4", (), r"bitsandbytes is needed .*specdec\[bitsandbytes\]"),
        ("w4a8", ("torchao",), "activations in 8 bit by groups need a CPU"),
        ("gguf-a8", ("torchao",), "activations in 8 bit by groups need a CPU"),
        ("int5", (), "unknown quantization 'int5'"),
    ],
)
def test_what_a_gpu_lacks_is_said_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, name: str, libraries: tuple[str, ...], message: str
) -> None:
    old = libraries == ("old",)
    pretend(monkeypatch, *(("torchao",) if old else libraries), parts=TORCHAO[:1] if old else TORCHAO)
    with pytest.raises(ValueError, match=message):
        check_runs(name, CUDA, torch.bfloat16)


def test_blocks_of_files_run_on_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    check_runs("gguf", CUDA, torch.float32)
    check_runs("gguf", CPU, "auto")


def test_what_is_missing_is_said_before_a_model_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with pytest.raises(ValueError, match="bitsandbytes is needed"):
        load_model("no such model", quantize="nf4", device="cpu")

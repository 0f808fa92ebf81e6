"""Every launcher compiles for devices that are not there, within their limits, and once whatever the lengths are."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.kernels.accept import Acceptance
from specdec.kernels.tree_attention import KVFormat, TreeMask

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install 'specdec[triton]'"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

NVIDIA = ["sm_80", "sm_90"]
TARGETS = [*NVIDIA, "gfx942"]
SPILL_BYTES = 32
"""What a thread may spill: a few scalars, as long as registers that a loop's body works with stay where they are."""


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of earlier runs do not stand in for these."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(
    dtype: torch.dtype = torch.bfloat16,
    width: int = 128,
    batch_size: int = 2,
    num_nodes: int = 64,
    num_slots: int = 4096,
    stored: torch.dtype | None = None,
    page: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    num_splits: int = 4,
) -> None:
    """Launch tree attention with 8 heads that read 2."""
    from specdec.kernels.tree_attention import triton

    num_pages = num_slots // page if page else 0
    shape = (batch_size * num_pages, 2, page, width) if page else (batch_size, 2, num_slots, width)
    keys = meta(*shape, dtype=stored or dtype)
    scales = meta(*shape[:-1], dtype=torch.float32) if stored else None
    table = meta(batch_size, num_pages, dtype=torch.int32) if page else None
    ancestors = meta(batch_size, num_nodes, num_nodes, dtype=torch.bool)
    mask = TreeMask(meta(batch_size), ancestors, meta(batch_size, num_nodes), window)
    query = meta(batch_size, num_nodes, 8, width, dtype=dtype).transpose(1, 2)
    triton.tree_attention_with_lse(
        query, keys, keys, mask, width**-0.5, softcap, None, KVFormat(table, scales, scales), num_splits
    )


def accept(batch_size: int = 2, num_nodes: int = 64, vocab_size: int = 128_256, coupled: bool = True) -> Acceptance:
    """Launch acceptance."""
    from specdec.kernels.accept import triton

    logits = meta(batch_size, num_nodes, vocab_size, dtype=torch.bfloat16)
    nodes = meta(batch_size, num_nodes)
    return triton.accept(logits, nodes, nodes, meta(batch_size, 9) if coupled else None, 0.7)


CONFIGURATIONS: list[dict[str, Any]] = [
    {"width": 128},
    {"width": 80, "dtype": torch.float16, "page": 16, "window": 512, "softcap": 30.0, "num_splits": 1},
    {"width": 64, "stored": torch.float8_e4m3fn, "num_nodes": 8},
    {"width": 256, "dtype": torch.float32, "num_nodes": 8},
]
MORE: list[dict[str, Any]] = [
    {"width": width, "dtype": dtype, "num_nodes": num_nodes, **options}
    for width in (64, 80, 96, 128, 256)
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    for num_nodes in (1, 8, 256)
    for options in ({}, {"window": 512, "softcap": 30.0}, {"page": 16, "stored": torch.int8}, {"num_splits": 1})
]


def check_attention(target: str, configuration: dict[str, Any]) -> None:
    """Compile, and hold to the device's limits."""
    from compile_only import SHARED_BYTES, compiled_launches

    with compiled_launches(target) as launches:
        attend(**configuration)
    names = [launch.name for launch in launches]
    assert names == ["tree_attention_kernel"] + ["merge_kernel"] * (configuration.get("num_splits") != 1)
    for launch in launches:
        assert launch.shared <= SHARED_BYTES[target]
        if not (configuration.get("stored") and configuration.get("dtype") == torch.float32):  # a rare pair
            assert launch.spilled <= SPILL_BYTES
    if target == "gfx942" or configuration.get("dtype") != torch.float32:  # NVIDIA's have no exact float32
        assert launches[0].tensor_core_instructions > 0
    if target in NVIDIA and "stored" not in configuration:
        assert "cp.async.cg.shared.global" in launches[0].code  # 16 bytes a copy: strides are known to allow it


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_attention_compiles_within_the_devices_limits(configuration: dict[str, Any], target: str) -> None:
    check_attention(target, configuration)


@pytest.mark.skipif("not config.getoption('--all-kernels')", reason="--all-kernels compiles every configuration")
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_compiles(target: str) -> None:
    for configuration in MORE:
        check_attention(target, configuration)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("coupled", [False, True], ids=["greedy", "coupled"])
def test_acceptance_compiles(coupled: bool, target: str) -> None:
    from compile_only import SHARED_BYTES, compiled_launches

    with compiled_launches(target) as launches:
        out = accept(coupled=coupled)
    assert out.packed.shape == (2, 67)
    assert [launch.name for launch in launches] == ["choice_kernel", "walk_kernel"]
    for launch in launches:
        assert launch.shared <= SHARED_BYTES[target]
        assert launch.spilled <= SPILL_BYTES


def test_lengths_and_batch_sizes_compile_nothing_anew() -> None:
    from compile_only import compiled_launches

    with compiled_launches("sm_90") as launches:
        for batch_size, num_slots, num_splits in ((2, 4096, 4), (1, 4097, 2), (5, 32, 16), (16, 33_333, 1 << 4)):
            attend(batch_size=batch_size, num_slots=num_slots, num_splits=num_splits)
        for num_nodes in (63, 33):
            attend(num_nodes=num_nodes)
        for batch_size, num_nodes in ((2, 64), (1, 33), (16, 50)):
            accept(batch_size=batch_size, num_nodes=num_nodes)
    binaries = {name: {one.key for one in launches if one.name == name} for name in {one.name for one in launches}}
    assert {name: len(keys) for name, keys in binaries.items()} == {
        "tree_attention_kernel": 1,
        "merge_kernel": 1,
        "choice_kernel": 1,
        "walk_kernel": 1,
    }

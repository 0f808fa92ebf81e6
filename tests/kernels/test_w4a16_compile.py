"""The launchers of w4a16 compile for devices that are not there, within their limits, and once whatever the rows."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from specdec.kernels.w4a16 import Int4Weight

if TYPE_CHECKING:
    from specdec.kernels.w4a16.triton import Config

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install 'specdec[triton]'"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]

TARGETS = ["sm_80", "sm_90", "gfx942"]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of earlier runs do not stand in for these."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def weight(num_outputs: int = 4096, num_inputs: int = 4096, group: int = 128, zero_points: bool = True) -> Int4Weight:
    """A weight without memory."""
    scales = torch.empty(num_outputs, num_inputs // group, dtype=torch.float16, device="meta")
    codes = torch.empty(num_outputs, num_inputs // 2, dtype=torch.uint8, device="meta")
    return Int4Weight(codes, scales, scales.to(torch.uint8) if zero_points else scales)


def inputs(num_rows: int, num_inputs: int = 4096, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Inputs without memory."""
    return torch.empty(num_rows, num_inputs, dtype=dtype, device="meta")


def shapes(num_rows: int) -> list[Config]:
    """The shipped configurations that differ in their code, which the number of splits does not."""
    from specdec.kernels.w4a16.triton import configs_for

    return [config for config in configs_for(num_rows) if config.splits == 2]


def check(target: str, num_rows: int, group: int, zero_points: bool, dtype: torch.dtype) -> None:
    from compile_only import SHARED_BYTES, compiled_launches

    from specdec.kernels.w4a16.triton import few_rows

    for config in shapes(num_rows):
        with compiled_launches(target) as launches:
            few_rows(inputs(num_rows, dtype=dtype), weight(group=group, zero_points=zero_points), config)
        product, total = launches
        assert (product.name, total.name) == ("few_rows_kernel", "sum_kernel")
        assert product.tensor_core_instructions > 0
        for launch in launches:
            assert launch.shared <= SHARED_BYTES[target]
            assert launch.spilled == 0


@pytest.mark.parametrize("target", TARGETS)
def test_few_rows_compile_within_the_devices_limits(target: str) -> None:
    check(target, 16, 32, False, torch.float16)
    check(target, 64, 128, True, torch.bfloat16)


@pytest.mark.skipif("not config.getoption('--all-kernels')", reason="--all-kernels compiles every configuration")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_configuration_compiles(dtype: torch.dtype, target: str) -> None:
    for num_rows in (1, 32, 64):
        for group in (32, 64, 128):
            for zero_points in (True, False):
                check(target, num_rows, group, zero_points, dtype)


@pytest.mark.parametrize("target", TARGETS)
def test_unpacking_compiles(target: str) -> None:
    from compile_only import SHARED_BYTES, compiled_launches

    from specdec.kernels.w4a16.triton import dequantize

    with compiled_launches(target) as launches:
        dequantize(weight(num_inputs=14336), torch.bfloat16)
        dequantize(weight(group=32, zero_points=False), torch.float16)
    for launch in launches:
        assert launch.shared <= SHARED_BYTES[target]
        assert launch.spilled == 0


def test_the_tensor_cores_of_a_generation_are_used() -> None:
    """Hopper's warp-group products, with the weight from registers: what making it the left operand is for."""
    from compile_only import compiled_launches

    from specdec.kernels.w4a16.triton import CONFIGS, few_rows

    code = {}
    for target in ("sm_80", "sm_90"):
        with compiled_launches(target) as launches:
            few_rows(inputs(8), weight(), CONFIGS[0])
        code[target] = launches[0].code
    assert "mma.sync" in code["sm_80"]
    assert "wgmma.mma_async" in code["sm_90"]
    assert "cp.async" in code["sm_80"]  # loads run ahead of the products


def test_numbers_of_rows_and_splits_compile_nothing_anew() -> None:
    from compile_only import compiled_launches

    from specdec.kernels.w4a16.triton import Config, few_rows

    with compiled_launches("sm_90") as launches:
        for num_rows in (1, 7, 8, 16):
            for splits in (1, 2, 16):
                few_rows(inputs(num_rows), weight(), Config(64, 128, splits, 4, 3))
    binaries = {name: {one.key for one in launches if one.name == name} for name in ("few_rows_kernel", "sum_kernel")}
    assert len(binaries["few_rows_kernel"]) == 2  # sums in float32 where there are splits
    assert len(binaries["sum_kernel"]) == 1

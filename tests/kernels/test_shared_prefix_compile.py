"""Attention with shared prefixes compiles for devices that are not there, once whatever groups and lengths are."""

from __future__ import annotations

import os
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdec.kernels.shared_prefix import PrefixLevel
from specdec.kernels.tree_attention import KVFormat, TreeMask

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install 'specdec[triton]'"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of earlier runs do not stand in for these."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def meta(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def attend(
    bounds: list[list[int]], prefix_slots: int = 4096, own_slots: int = 320, num_nodes: int = 8, width: int = 128,
    dtype: torch.dtype = torch.bfloat16, page: int = 0,
) -> None:  # fmt: skip
    """Launch with 8 heads that read 2; a level's groups lie between its bounds."""
    from specdec.kernels.shared_prefix import triton

    batch_size = max(b[-1] for b in bounds)
    levels = []
    for places in bounds:
        groups = len(places) - 1
        shape = (groups * prefix_slots // page, 2, page, width) if page else (groups, 2, prefix_slots, width)
        storage = KVFormat(meta(groups, prefix_slots // page, dtype=torch.int32)) if page else KVFormat()
        keys = meta(*shape, dtype=dtype)
        levels.append(PrefixLevel(keys, keys, meta(groups), tuple(pairwise(places)), storage))
    ancestors = meta(batch_size, num_nodes, num_nodes, dtype=torch.bool)
    mask = TreeMask(meta(batch_size), ancestors, meta(batch_size, num_nodes))
    query = meta(batch_size, num_nodes, 8, width, dtype=dtype).transpose(1, 2)
    own = meta(batch_size, 2, own_slots, width, dtype=dtype)
    triton.shared_prefix_with_lse(query, levels, own, own, mask, width**-0.5)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("page", [0, 16])
def test_prefix_and_own_launches_compile_within_the_devices_limits(page: int, target: str) -> None:
    from compile_only import SHARED_BYTES, compiled_launches

    with compiled_launches(target) as launches:
        attend([[0, 64], [0, 16, 48]], page=page)
    assert [launch.name for launch in launches] == ["tree_attention_kernel"] * 3 + ["merge_kernel"]
    for launch in launches:
        assert launch.shared <= SHARED_BYTES[target]
        assert launch.spilled <= 32  # as for tree attention
    for launch in launches[:3]:
        assert launch.tensor_core_instructions > 0


def test_groups_and_lengths_compile_nothing_anew() -> None:
    from compile_only import compiled_launches

    with compiled_launches("sm_90") as launches:
        attend([[0, 64]])
        attend([[0, 64], [0, 16, 48]], prefix_slots=1030, own_slots=77)
        attend([[0, 9, 33, 40, 70, 71]], num_nodes=33, own_slots=4097)
    binaries = {name: {one.key for one in launches if one.name == name} for name in {one.name for one in launches}}
    # Prefixes and own keys differ: no mask or ancestors. Own tiles are 32 rows tall for 8 nodes, 64 from 9 on.
    assert {name: len(keys) for name, keys in binaries.items()} == {"tree_attention_kernel": 3, "merge_kernel": 1}

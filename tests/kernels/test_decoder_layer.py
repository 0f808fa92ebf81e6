"""The compiled kernels against float64, and row by row against themselves."""

from __future__ import annotations

import copy
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdec.kernels import build, decoder_layer
from specdec.kernels.decoder_layer import TOGETHER, Kernels, find_kernels, reference

RELATIVE = 2.0**-8 + 2.0**-20
"""Rounding to bfloat16, and a few float32 roundings before it."""


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    found = find_kernels()
    if found is None:
        pytest.skip("no C compiler")
    return found


def near(got: Tensor, expected: Tensor, slack: float | Tensor = 0.0) -> bool:
    """Equal but for rounding, and for ``slack`` where sums cancel."""
    return bool(((got.double() - expected).abs() <= RELATIVE * expected.abs() + slack).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_a_table(kernels: Kernels, dtype: torch.dtype) -> None:
    table, indices = torch.randn(7, 48).to(dtype), torch.tensor([[6, 0, 3], [3, 3, 1]])
    assert torch.equal(kernels.take_rows(table, indices), table[indices])
    for bad in (7, -1):
        with pytest.raises(IndexError, match=f"the table has 7 rows, got index {bad}"):
            kernels.take_rows(table, torch.tensor([2, bad, 9]))


@pytest.mark.parametrize("width", [3, 30_000])
def test_rows_to_places_of_a_table(kernels: Kernels, width: int) -> None:
    rows, places, out = torch.randn(5, width), torch.tensor([0, 7, 3, 2, 5]), torch.full((2, 4, width), torch.nan)
    assert kernels.put_rows(rows, places, out) is out
    assert torch.equal(out.flatten(0, 1)[places], rows)
    assert out.flatten(0, 1)[[1, 4, 6]].isnan().all()


@pytest.mark.parametrize("width", [16, 48, 576])
def test_rms_norm(kernels: Kernels, width: int) -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(2, 3, width).mul(50).bfloat16(), torch.randn(width).bfloat16()
    assert near(kernels.rms_norm(states, weight, 1e-5), reference.rms_norm(states, weight, 1e-5))


def test_gated_over_all_magnitudes(kernels: Kernels) -> None:
    gates = torch.cat([torch.linspace(-120, 120, 481), torch.logspace(-8, 2, 31)]).bfloat16()
    up = torch.linspace(-3, 3, 512).bfloat16()
    got = kernels.gated(torch.cat([gates, up]).unsqueeze(0))[0]
    expected = reference.gated(torch.cat([gates, up]).unsqueeze(0))[0]
    assert near(got, expected, 1e-34)  # exponents end at 87: what is left then is 120 * exp(-87) * 3 at most


def test_nan_stays_nan(kernels: Kernels) -> None:
    states = torch.ones(2, 32).bfloat16()
    states[0, 3] = torch.nan
    assert kernels.gated(states).isnan().tolist() == [[i == 3 for i in range(16)], [False] * 16]
    norm = kernels.rms_norm(states, torch.ones(32).bfloat16(), 1e-5)
    assert norm.isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "width", "count"), [(1, 7, 7), (3, 16, 1), (5, 1000, 8), (2, 8192, 64)])
def test_top(kernels: Kernels, dtype: torch.dtype, rows: int, width: int, count: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(rows, width).mul(5).to(dtype)
    best, index, total = kernels.top(logits, count)
    assert torch.equal(best, logits.float().topk(count).values)
    assert torch.equal(logits.float().gather(1, index), best)
    assert all(len(set(row)) == count for row in index.tolist())
    # 2e-7 of each exponential, and of the sum as many additions as a lane holds, rounded to half a step each
    assert float((total.double() - logits.double().logsumexp(-1)).abs().max()) <= 2e-6 + width / 16 * 2.0**-24


def test_top_of_equals_is_the_first_and_nan_is_none(kernels: Kernels) -> None:
    logits = torch.zeros(2, 40).bfloat16()
    logits[1, 3] = torch.nan
    best, index, total = kernels.top(logits, 4)
    assert index.tolist() == [[0, 1, 2, 3], [0, 1, 2, 4]]
    assert best.tolist() == [[0.0] * 4] * 2
    assert total.isnan().tolist() == [False, True]


@pytest.mark.parametrize("width", [16, 576])
def test_activations_in_8_bit(kernels: Kernels, width: int) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(7, width) * torch.logspace(-6, 6, 7).unsqueeze(1)).bfloat16()
    inputs[3] = 0
    rows, scales = kernels.quantize_rows(inputs)
    largest = inputs.double().abs().amax(-1).clamp(min=127e-12)
    assert torch.allclose(scales.double(), largest / 127, rtol=1e-6, atol=0)
    exact = inputs.double() / (largest / 127).unsqueeze(1) + 128
    assert ((rows.double() - exact).abs() <= 0.5 + 1e-4).all()  # to the nearest, but for float32 at ties
    inputs[2, 5], inputs[4, 0] = torch.nan, torch.inf
    assert kernels.quantize_rows(inputs)[1].isnan().tolist() == [row in (2, 4) for row in range(7)]


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_activations_in_8_bit_by_groups(kernels: Kernels, rows: int) -> None:
    torch.manual_seed(0)
    inputs = (torch.randn(rows, 3 * TOGETHER) * torch.logspace(-6, 6, rows).unsqueeze(1)).bfloat16()
    inputs[rows // 2, TOGETHER : 2 * TOGETHER] = 0
    bytes_, scales, totals = by_groups(kernels, inputs)
    largest = inputs.double().view(rows, 3, -1).abs().amax(-1).clamp(min=127e-12)
    assert torch.allclose(scales.double(), largest / 127, rtol=1e-6, atol=0)
    exact = inputs.double().view(rows, 3, -1) / (largest / 127).unsqueeze(-1)
    assert ((bytes_.double() - exact).abs() <= 0.5 + 1e-4).all()  # to the nearest, but for float32 at ties
    assert torch.equal(totals, scales * bytes_.sum(-1))
    inputs[0, 5], inputs[-1, 40] = torch.nan, torch.inf
    broken = by_groups(kernels, inputs)[1].isnan()
    assert broken.nonzero().tolist() == sorted([[0, 0], [rows - 1, 1]])


def by_groups(kernels: Kernels, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes ``[rows, groups, TOGETHER]``, scales and totals ``[rows, groups]``, from where the kernels have them."""
    bytes_, factors = kernels.quantize_groups(inputs)
    groups, parts, first = inputs.shape[1] // TOGETHER, [], 0
    for block in inputs.split(256):
        count = len(block) * groups
        numbers = bytes_[first * TOGETHER : (first + count) * TOGETHER].view(groups, len(block), TOGETHER)
        both = factors[2 * first : 2 * (first + count)].view(groups, len(block), 2)
        parts.append((numbers.transpose(0, 1), both[..., 0].T, both[..., 1].T))
        first += count
    bytes_, scales, totals = (torch.cat(part) for part in zip(*parts, strict=True))
    return bytes_, scales, totals


class Case:
    """A pass's inputs: rows of different lengths, a tree in which every node's parent is any earlier one."""

    def __init__(
        self, lengths: list[int], nodes: int, earlier: int = 0, heads: int = 9, kv_heads: int = 3, width: int = 64
    ) -> None:
        batch, tree = len(lengths), nodes + earlier
        self.slots = max(lengths) + tree + 3
        self.qkv = torch.randn(batch, nodes, (heads + 2 * kv_heads) * width).bfloat16()
        angles = torch.rand(batch, nodes, width // 2).repeat(1, 1, 2) * 6
        self.rotary = angles.cos().bfloat16(), angles.sin().bfloat16()
        shape = (batch, kv_heads, self.slots, width)
        self.keys, self.values = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
        self.lengths = torch.tensor(lengths)
        parents = [[-1, *(int(torch.randint(node, ())) for node in range(1, tree))] for _ in range(batch)]
        seen = torch.zeros(batch, tree, tree, dtype=torch.bool)
        depth = torch.zeros(batch, tree, dtype=torch.int64)
        for row in range(batch):
            for node in range(tree):
                parent = parents[row][node]
                if parent >= 0:
                    seen[row, node] = seen[row, parent]
                    depth[row, node] = depth[row, parent] + 1
                seen[row, node, node] = True
        self.depth, self.seen = depth, seen[:, earlier:].contiguous()
        for row, length in enumerate(lengths):  # nothing behind the tree may be read
            self.keys[row, :, length + tree :] = torch.nan
            self.values[row, :, length + tree :] = torch.nan
        self.scale = width**-0.5

    def of_sizes(self) -> Case:
        """The same with the sizes of all values, whose signs are dropped."""
        other = copy.copy(self)
        other.values, other.qkv = self.values.abs(), self.qkv.clone()
        other.qkv[..., -self.values.shape[1] * self.values.shape[3] :].abs_()
        return other

    def run(self, attention: object, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Output, keys and values after the pass."""
        keys, values = self.keys.clone(), self.values.clone()
        out = attention(  # type: ignore[operator]
            self.qkv, self.rotary, keys, values, self.lengths, self.depth, self.seen, self.scale, window
        )
        return out, keys, values


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(9, 3, 64), (14, 2, 32), (2, 2, 96), (8, 2, 128)])
@pytest.mark.parametrize(
    ("lengths", "nodes", "earlier"), [([0], 1, 0), ([50, 3], 7, 0), ([513], 17, 4), ([16, 15], 63, 1)]
)
@pytest.mark.parametrize("window", [None, 9])
def test_attention(
    kernels: Kernels, heads: int, kv_heads: int, width: int, lengths: list[int], nodes: int, earlier: int,
    window: int | None,
) -> None:  # fmt: skip
    torch.manual_seed(1)
    case = Case(lengths, nodes, earlier, heads, kv_heads, width)
    got, keys, values = case.run(kernels.attention, window)
    expected, wanted_keys, wanted_values = case.run(reference.attention, window)
    assert torch.equal(values.nan_to_num(99), wanted_values.nan_to_num(99))
    # A rotated key can fall on the other side of a tie between two bfloat16 numbers.
    assert near(keys.nan_to_num(99), wanted_keys.nan_to_num(99).double(), 2.0**-18)
    # Weights sum to 1, so an output is off by its rounding and by what such keys and float32 exponents make of it. The
    # matrix unit reads weights in bfloat16, each off by a share of 2^-9 of itself, and divides by the sum of those.
    slack = torch.full_like(expected, 2e-3)
    if kernels.has_matrix_unit:
        sizes = case.of_sizes().run(reference.attention, window)[0]
        slack += 2.0**-9 * (sizes + expected.abs())
    assert near(got, expected, slack)
    exact = case.run(kernels.attention, window)[0]
    assert torch.equal(got, exact)


def test_a_row_does_not_depend_on_the_tree_it_rides_in(kernels: Kernels) -> None:
    """A chain alone, token by token, and inside a tree with its nodes spread among others: the same bits."""
    torch.manual_seed(2)
    length, chain = 37, 9
    tree = Case([length], 2 * chain)
    for node in range(2 * chain):  # even nodes are the chain, odd ones its siblings
        tree.depth[0, node] = (node + 1) // 2
        tree.seen[0, node] = False
        tree.seen[0, node, [*range(0, node, 2), node]] = True
    whole = tree.run(kernels.attention)[0]
    keys, values = tree.keys.clone(), tree.values.clone()
    for step in range(chain):
        node = 2 * step
        rotary = (tree.rotary[0][:, node : node + 1].contiguous(), tree.rotary[1][:, node : node + 1].contiguous())
        single = kernels.attention(
            tree.qkv[:, node : node + 1].contiguous(), rotary, keys, values, torch.tensor([length + step]),
            torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1, dtype=torch.bool), tree.scale,
        )  # fmt: skip
        assert torch.equal(single[0, 0], whole[0, node]), step


@pytest.mark.parametrize("window", [None, 40])
def test_segments_that_rows_share_are_as_good_as_their_own(kernels: Kernels, window: int | None) -> None:
    """A prefix all rows have, one that two have, and none: the bits of rows that hold everything themselves."""
    torch.manual_seed(4)
    lengths, shared = [91, 87, 60], [(33, 50), (33, 50), (33, 0)]
    case = Case(lengths, 11, 2)
    for row in (1, 2):
        case.keys[row, :, :33], case.values[row, :, :33] = case.keys[0, :, :33], case.values[0, :, :33]
    case.keys[1, :, :83], case.values[1, :, :83] = case.keys[0, :, :83], case.values[0, :, :83]
    whole, keys, values = case.run(kernels.attention, window)
    parts = [
        [case.keys[0, :, :33].clone(), case.values[0, :, :33].clone()],
        [torch.cat([part[0, :, 33:83], part[0, :, :9]], dim=1) for part in (case.keys, case.values)],  # with some slack
    ]
    segments = torch.tensor(
        [
            [
                (keys.data_ptr(), values.data_ptr(), length, keys.shape[1])
                for (keys, values), length in zip(parts, row, strict=True)
            ]
            for row in shared
        ]
    )
    own_keys, own_values = torch.full_like(keys, torch.nan), torch.full_like(values, torch.nan)
    for row, lent in enumerate(map(sum, shared)):
        own_keys[row, :, : lengths[row] + 2 - lent] = case.keys[row, :, lent : lengths[row] + 2]
        own_values[row, :, : lengths[row] + 2 - lent] = case.values[row, :, lent : lengths[row] + 2]
    got = kernels.attention(
        case.qkv, case.rotary, own_keys, own_values, case.lengths, case.depth, case.seen, case.scale, window, segments
    )
    assert torch.equal(got, whole)
    for row, lent in enumerate(map(sum, shared)):
        end = lengths[row] + 13
        assert torch.equal(own_keys[row, :, : end - lent], keys[row, :, lent:end])
        assert torch.equal(own_values[row, :, : end - lent], values[row, :, lent:end])


def test_too_many_levels_of_segments(kernels: Kernels) -> None:
    case = Case([3], 1)
    with pytest.raises(ValueError, match="8 segments at most, got 9"):
        kernels.attention(
            case.qkv, case.rotary, case.keys, case.values, case.lengths, case.depth, case.seen, case.scale,
            segments=torch.zeros(1, 9, 4, dtype=torch.int64),
        )  # fmt: skip


def test_a_row_does_not_depend_on_the_batch(kernels: Kernels) -> None:
    torch.manual_seed(3)
    case = Case([70, 5, 33], 12)
    whole = case.run(kernels.attention)[0]
    for row in range(3):
        part = slice(row, row + 1)
        alone = kernels.attention(
            case.qkv[part], (case.rotary[0][part], case.rotary[1][part]), case.keys[part].clone(),
            case.values[part].clone(), case.lengths[part], case.depth[part], case.seen[part], case.scale,
        )  # fmt: skip
        assert torch.equal(alone[0], whole[row])


def test_threads_change_nothing(kernels: Kernels) -> None:
    torch.manual_seed(4)
    case, threads = Case([130], 33), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.run(kernels.attention)[0]
        torch.set_num_threads(2)
        assert torch.equal(case.run(kernels.attention)[0], one)
    finally:
        torch.set_num_threads(threads)


def test_a_forked_process_computes_without_its_parents_threads(kernels: Kernels) -> None:
    program = """
import os, torch
from specdec.kernels.decoder_layer import find_kernels
torch.set_num_threads(2)
kernels, states, weight = find_kernels(), torch.ones(64, 32).bfloat16(), torch.ones(32).bfloat16()
expected = kernels.rms_norm(states, weight, 0.0)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(kernels.rms_norm(states, weight, 0.0), expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(kernels.rms_norm(states, weight, 0.0), expected)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120)


def test_callers_in_several_threads_do_not_mix(kernels: Kernels) -> None:
    """One has the workers, the others compute alone."""
    torch.manual_seed(6)
    weight = torch.randn(64).bfloat16()
    inputs = [torch.randn(40, 64).bfloat16() for _ in range(3)]
    expected = [kernels.rms_norm(states, weight, 1e-5) for states in inputs]

    def repeat(index: int) -> bool:
        return all(torch.equal(kernels.rms_norm(inputs[index], weight, 1e-5), expected[index]) for _ in range(300))

    with ThreadPoolExecutor(3) as executor:
        assert all(executor.map(repeat, range(3)))


def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "two.c"
    source.write_text("int two(void) { return 2; }")
    try:
        assert build.load_library(source, tmp_path / "made").two() == 2
    except build.NotBuilt:
        pytest.skip("no C compiler")
    monkeypatch.setattr(build.shutil, "which", lambda _: None)
    assert build.load_library(source, tmp_path / "made").two() == 2
    source.write_text("int two(void) { return 3; }")
    with pytest.raises(build.NotBuilt, match="no C compiler"):
        build.load_library(source, tmp_path / "made")


def test_what_the_compiler_is_told_besides_makes_another_library(tmp_path: Path) -> None:
    source = tmp_path / "two.c"
    source.write_text("int two(void) { return NUMBER; }\n")
    try:
        libraries = [build.load_library(source, tmp_path / "made", [f"-DNUMBER={number}"]) for number in (2, 3)]
    except build.NotBuilt:
        pytest.skip("no C compiler")
    assert [library.two() for library in libraries] == [2, 3]


def test_what_the_compiler_says_is_told(tmp_path: Path) -> None:
    source = tmp_path / "bad.c"
    source.write_text("int two(void) { return }")
    with pytest.raises(build.NotBuilt, match=r"failed on bad\.c|no C compiler"):
        build.load_library(source, tmp_path / "made")


def test_without_a_compiler_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path) -> None:
        raise build.NotBuilt("no C compiler (cc) is installed")

    monkeypatch.setattr(decoder_layer, "load_library", fail)
    with pytest.warns(RuntimeWarning, match="no C compiler"):
        assert find_kernels.__wrapped__() is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are x86's")
@pytest.mark.parametrize("flag", ["-mno-avx512f", "-mno-avx2"])
def test_attention_on_lesser_processors(flag: str, tmp_path: Path) -> None:
    try:
        plain = Kernels(build.load_library(decoder_layer.SOURCE, tmp_path, [flag]))
    except build.NotBuilt as error:
        pytest.skip(str(error))
    torch.manual_seed(5)
    case = Case([33, 70], 9, 2)
    assert near(case.run(plain.attention)[0], case.run(reference.attention)[0], 2e-3)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86's")
@pytest.mark.parametrize(
    "processor", ["x86-64", "haswell", "alderlake", "skylake-avx512", "icelake-server", "cooperlake", "sapphirerapids"]
)
def test_the_source_is_compiled_for_other_processors(processor: str, tmp_path: Path) -> None:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C compiler")
    command = [compiler, *build.FLAGS, f"-march={processor}", "-S", "-o", str(tmp_path / "kernels.s")]
    done = subprocess.run([*command, str(decoder_layer.SOURCE)], capture_output=True, text=True, timeout=120)
    if "-march=" in done.stderr:
        pytest.skip(f"{compiler} does not know {processor}")
    assert done.returncode == 0, done.stderr

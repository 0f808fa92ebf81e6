"""Times of the operations in ``specdec.kernels``, each beside the least time its bytes and arithmetic take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from specdec.benchmarks.record import commit, machine, versions

Call = Callable[[], Any]

OURS = "specdec"
"""Name of our row in a case's results."""
SECONDS = 420.0
"""What a run takes at most, but for the first compilation of the last case."""
CPU_NOTE = (
    "No CUDA device: these are the CPU paths at small sizes. They say nothing of the Triton kernels and are not to be "
    "published."
)
_FORMAT = 1
_MIN_SAMPLES, _MAX_SAMPLES = 5, 50
_MAX_BUFFERS = 32


@dataclass(frozen=True)
class KernelCase:
    """One operation at one size.

    Attributes:
        shape: what tells the case from others of its operation.
        make: operands for a seed, on the device.
        bind: a call of our operation on operands.
        num_bytes: what must be read and written at the least.
        flops: arithmetic of the product, 0 where it does not matter.
        contenders: other ways to the same result, by name; one that raises is reported as not available, one whose
            result differs as that.
        expected: the reference's result, for cases small enough for it.
    """

    shape: Mapping[str, int | str]
    make: Callable[[int], Any]
    bind: Callable[[Any], Call]
    num_bytes: int
    flops: int = 0
    contenders: Mapping[str, Callable[[Any], Call]] = field(default_factory=dict)
    expected: Callable[[Any], Any] | None = None


Cases = Callable[[torch.device, bool], list[KernelCase]]
"""Cases of an operation on a device; small ones, with ``expected``, or those to be timed on a GPU."""


def run_kernels(
    device: torch.device,
    operations: Mapping[str, Cases],
    seconds: float = SECONDS,
    progress: Callable[[str], None] = lambda _: None,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """Check every operation against its reference at small sizes, then time it.

    Args:
        device: on a CPU the small cases are timed.
        operations: name -> cases.
        seconds: for all of it; later cases get what earlier ones leave.
        progress: told what is being done.
        command: kept in the result.

    Returns:
        The result as JSON holds it; ``publishable`` only where a GPU was measured and no contender's result differs.

    Raises:
        RuntimeError: where a result is wrong, before anything is timed.
    """
    deadline = perf_counter() + seconds
    for name, cases in operations.items():
        progress(f"checking {name}")
        for case in cases(device, True):
            _check(name, case)
    on_gpu = device.type == "cuda"
    todo = [(name, case) for name, cases in operations.items() for case in cases(device, not on_gpu)]
    bandwidth, rate = copy_bandwidth(device), matmul_rate(device)
    done = []
    for index, (name, case) in enumerate(todo):
        progress(f"[{index + 1}/{len(todo)}] {name} {describe(case.shape)}")
        until = perf_counter() + max(deadline - perf_counter(), 0.0) / (len(todo) - index)
        done.append({"operation": name, **_measure(case, device, until, bandwidth, rate)})
    agreed = not any("differs" in found for case in done for found in case["results"].values())
    return {
        "format": _FORMAT,
        "kind": "kernels",
        "publishable": on_gpu and agreed,
        "note": None if on_gpu else CPU_NOTE,
        "machine": machine(device),
        "versions": versions(),
        "commit": commit(),
        "command": list(command),
        "copy_gb_s": bandwidth / 1e9,
        "matmul_tflops": rate / 1e12,
        "cases": done,
    }


def describe(shape: Mapping[str, int | str]) -> str:
    """A case's shape in one line."""
    return ", ".join(f"{name} {value}" for name, value in shape.items())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy, those read and those written, of a buffer that no cache holds."""
    size = (1 << 30) if device.type == "cuda" else (1 << 26)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2.0 * size / _median_seconds(lambda: target.copy_(source), device)


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a large square product: bfloat16 on a GPU, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2.0 * size**3 / _median_seconds(lambda: left @ right, device)


def _median_seconds(call: Call, device: torch.device) -> float:
    sample = sampler([call], device)
    sample.microseconds()
    return median(sample.microseconds() for _ in range(9)) / 1e6


@dataclass(frozen=True)
class Sampler:
    """How to time a call.

    Attributes:
        microseconds: takes one sample, the mean over all buffers.
        kind: "graph" (CUDA graph, free of launch costs), "stream" (CUDA events around ordinary calls), or "clock".
    """

    microseconds: Callable[[], float]
    kind: str


def sampler(calls: Sequence[Call], device: torch.device) -> Sampler:
    """Time calls that do the same on different buffers, one after the other: a GPU's cache then holds none of them."""
    if device.type != "cuda":

        def clock() -> float:
            start = perf_counter()
            for call in calls:
                call()
            return 1e6 * (perf_counter() - start) / len(calls)

        clock()
        return Sampler(clock, "clock")

    def on_stream() -> None:
        for call in calls:
            call()

    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        on_stream()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    replay: Call
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            on_stream()
    except RuntimeError:  # it waits for the device, say
        torch.cuda.synchronize(device)
        replay, kind = on_stream, "stream"
    else:
        replay, kind = graph.replay, "graph"

    def events() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return 1e3 * float(begin.elapsed_time(end)) / len(calls)

    return Sampler(events, kind)


def _check(name: str, case: KernelCase) -> None:
    """Raise RuntimeError where our result is not the reference's."""
    if case.expected is None:
        raise ValueError(f"the small case {describe(case.shape)} of {name} needs an expected result")
    operands = case.make(0)
    difference = disagreement(case.bind(operands)(), case.expected(operands))
    if difference is not None:
        raise RuntimeError(f"{name} ({describe(case.shape)}) is wrong: {difference}")


def disagreement(got: Any, expected: Any) -> str | None:
    """How two results differ by more than rounding, 4 eps of the largest number; None where they do not."""
    if not isinstance(got, Tensor) or got.shape != expected.shape:
        return f"{got!r:.80} instead of {expected!r:.80}"
    if not got.is_floating_point():
        return None if torch.equal(got, expected) else "whole numbers differ"
    allowed = 4.0 * torch.finfo(got.dtype).eps * float(expected.abs().max())
    off = float((got.float() - expected.float()).abs().max())
    return None if off <= allowed else f"off by {off:.3g}, {allowed:.3g} is allowed"  # NaN differs, too


def num_buffers(device: torch.device, num_bytes: int) -> int:
    """Sets of operands whose reading empties the cache four times, as far as half of the free memory goes."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    fits = torch.cuda.mem_get_info(device)[0] // (2 * max(num_bytes, 1))
    return max(1, min(math.ceil(4 * cache / max(num_bytes, 1)) + 1, _MAX_BUFFERS, fits))


def _measure(case: KernelCase, device: torch.device, until: float, bandwidth: float, rate: float) -> dict[str, Any]:
    floor = 1e6 * max(case.num_bytes / bandwidth, case.flops / rate)
    results: dict[str, Any] = {}
    samplers: dict[str, Sampler] = {}
    count = num_buffers(device, case.num_bytes)
    try:
        buffers = [case.make(seed) for seed in range(count)]
        ours: Any = None
        for contender, bind in {OURS: case.bind, **case.contenders}.items():
            try:
                calls = [bind(operands) for operands in buffers]
                out = calls[0]()
                if contender == OURS:
                    ours = out
                elif (difference := disagreement(out, ours)) is not None:
                    results[contender] = {"differs": difference}
                    continue
                samplers[contender] = sampler(calls, device)
            except Exception as error:
                if contender == OURS:
                    raise
                results[contender] = {"unavailable": _reason(error)}
    except torch.OutOfMemoryError as error:
        results[OURS] = {"unavailable": _reason(error)}
        samplers.clear()
    samples: dict[str, list[float]] = {contender: [] for contender in samplers}
    while samples and len(samples[OURS]) < _MAX_SAMPLES:  # by turns, so that a slow spell touches all alike
        for contender, sample in samplers.items():
            samples[contender].append(sample.microseconds())
        if perf_counter() > until and len(samples[OURS]) >= _MIN_SAMPLES:
            break
    for contender, found in samples.items():
        low, *_, high = quantiles(found, n=10)
        results[contender] = {
            "median_us": median(found), "p10_us": low, "p90_us": high, "samples": len(found),
            "of_floor": floor / median(found), "timed_by": samplers[contender].kind,
        }  # fmt: skip
    return {
        "shape": dict(case.shape), "num_bytes": case.num_bytes, "flops": case.flops, "floor_us": floor,
        "buffers": count, "results": results,
    }  # fmt: skip


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]

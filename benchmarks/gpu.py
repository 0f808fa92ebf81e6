"""Captured passes beside eager ones on a CUDA device: ``python -m specdec.benchmarks.gpu``.

In this order: their logits are compared, and nothing is timed where they differ; the device's idle time within a step
and the times a step waits for it are measured; then L(n); then whole generations, by turns.

Models are the embedded one and random weights of an 8B Llama's shape. Random weights write nothing that could be
guessed, so drafts are the text itself, wrong with a given chance at every token (``Rehearsed``): that is the speed at a
known rate of acceptance, not a drafter's.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from torch.profiler import ProfilerActivity, profile

from specdec.batch import Batch
from specdec.benchmarks.record import commit, machine, versions, write_json
from specdec.benchmarks.roofline import measure_roofline
from specdec.decoder import SpecDecoder
from specdec.drafters.base import Drafter
from specdec.graphs import GraphTarget
from specdec.latency import measure_curve
from specdec.target import HFTarget
from specdec.tree import TokenTree, TreeBuilder

MODELS = ("smollm2", "llama-8b")
SIZES: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip
"""Of Llama 3.1 8B."""
TINY = SIZES | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 512,
}  # fmt: skip
NO_CUDA = (
    "this measures captured CUDA graphs and torch sees no CUDA device; --device cpu --tiny tries the script itself out"
)
CPU_NOTE = "No CUDA device: nothing is captured, times say nothing and are not to be published."
ACCEPTED = 0.7
"""Chance that a rehearsed token is right."""
DEPTH = 5


@dataclass(frozen=True)
class Busy:
    """What a device did in a span of time.

    Attributes:
        span_ms: from the first piece of work to the end of the last.
        busy_ms: in which something ran.
        pieces: of work.
    """

    span_ms: float
    busy_ms: float
    pieces: int

    @property
    def idle(self) -> float:
        """Share of the span in which nothing ran."""
        return 1.0 - self.busy_ms / self.span_ms if self.span_ms else 0.0


def busy_time(intervals: Sequence[tuple[float, float]]) -> Busy:
    """The union of ``(start, end)`` pairs, in microseconds, which may overlap."""
    end, busy, first = -float("inf"), 0.0, min((start for start, _ in intervals), default=0.0)
    for start, stop in sorted(intervals):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return Busy(max(0.0, end - first) / 1000, busy / 1000, len(intervals))


class Rehearsed(Drafter):
    """Drafts a text that is known already, each token wrong with a given chance.

    Args:
        texts: token ids of whole rows, prompts included.
        accepted: chance that a token is right.
        depth: of the chains.
    """

    name = "rehearsed"

    def __init__(self, texts: Sequence[Sequence[int]], accepted: float = ACCEPTED, depth: int = DEPTH) -> None:
        self._texts = [list(text) for text in texts]
        self._accepted, self._depth, self._vocab = accepted, depth, 0

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        self._vocab = target.vocab_size

    def start(self, batch: Batch, output: Any) -> None:
        self._random = torch.Generator().manual_seed(0)

    def propose(self, batch: Batch) -> TokenTree:
        rows = []
        for row in batch.rows:
            builder, place = TreeBuilder(row.pending, self._depth + 1), len(row.tokens)
            ahead = next((text[place : place + self._depth] for text in self._texts if text[:place] == row.tokens), [])
            right = torch.rand(self._depth, generator=self._random) < self._accepted
            builder.add_path(
                token if good else (token + 1) % self._vocab for token, good in zip(ahead, right.tolist(), strict=False)
            )
            rows.append(builder)
        return TokenTree.from_rows(rows, batch.device)


def load(name: str, device: torch.device, tiny: bool) -> Any:
    """A model by name: the embedded one, or random weights of a shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if name == "smollm2" and not tiny:
        from specdec.models import load_model

        return load_model("smollm2", dtype="bf16", device=device).model
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(LlamaConfig(**(TINY if tiny else SIZES)))
    finally:
        torch.set_default_dtype(before)
    model.requires_grad_(False)
    return model


def comb(nodes: int, rows: int, vocab: int, device: torch.device) -> TokenTree:
    """Trees with a spine and leaves on it: every other node goes on from the one two before."""
    tokens = (torch.arange(rows * nodes, device=device).view(rows, nodes) * 17 + 3) % vocab
    parents = (torch.arange(nodes, device=device) - 2).clamp(min=0)
    parents[0] = -1
    return TokenTree(tokens, parents.expand(rows, -1).clone())


@torch.inference_mode()
def compare(eager: HFTarget, graphs: HFTarget, sizes: Sequence[int] = (1, 3, 8, 13, 33)) -> list[dict[str, float]]:
    """Largest differences of logits, and what rounding explains.

    Passes of different widths run different kernels; eager ones over a tree and over the same with a node more say how
    far that goes. Twice as much is allowed, and 16 roundings of the largest logit.

    Raises:
        RuntimeError: where the difference is larger.
    """
    found = []
    prompts = [[(7 * k + row) % eager.vocab_size for k in range(40 - 9 * row)] for row in range(2)]
    for nodes in sizes:
        logits = []
        for target, more in ((eager, 0), (eager, 1), (graphs, 0), (graphs, 0)):
            cache = target.new_cache(2, 128)
            target.extend(prompts, cache)
            tree = comb(nodes + more, 2, target.vocab_size, target.device)
            if more:
                tree = TokenTree(torch.cat([comb(nodes, 2, target.vocab_size, target.device).tokens,
                                            tree.tokens[:, -1:]], dim=1), tree.parents)  # fmt: skip
            logits.append(target.forward(tree, cache).logits[:, :nodes].float())
        plain, wider, first, again = logits
        rounding = 16 * torch.finfo(eager.dtype).eps * float(plain.abs().max())
        bound = 2 * float((plain - wider).abs().max()) + rounding
        worst = max(float((each - plain).abs().max()) for each in (first, again))
        if not worst <= bound:  # NaN as well
            raise RuntimeError(
                f"a captured pass over {nodes} nodes gives logits {worst:.4g} off the eager one's; rounding explains "
                f"{bound:.4g}"
            )
        found.append({"nodes": nodes, "difference": worst, "bound": bound})
    return found


def make_decoder(target: HFTarget, texts: Sequence[Sequence[int]] | None) -> SpecDecoder:
    """Plain decoding, or drafts of known texts, in trees as they come."""
    drafter = "none" if texts is None else Rehearsed(texts)
    return SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise")


def steps(decoder: SpecDecoder, prompt: Sequence[int], count: int) -> Callable[[], int]:
    """A call that decodes so many tokens, and returns how many passes it took."""

    def call() -> int:
        decoder.generate(list(prompt), max_new_tokens=count, ignore_eos=True)
        return decoder.stats.passes

    return call


def measure_gaps(call: Callable[[], int], device: torch.device) -> dict[str, float]:
    """Idle share of the device, kernels and waits per pass of a call that ran before."""
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        passes = call()
        _finish(device)
    wanted = "CUDA" if device.type == "cuda" else "CPU"
    work = [e.time_range for e in profiler.events() or () if str(e.device_type).endswith(wanted)]
    busy = busy_time([(each.start, each.end) for each in work])
    found = {"idle": busy.idle, "pieces_per_pass": busy.pieces / passes, "span_ms_per_pass": busy.span_ms / passes}
    return found | {"waits_per_pass": _count_waits(call, device) / passes}


def _count_waits(call: Callable[[], int], device: torch.device) -> int:
    """Times the host waited for the device, as torch reports them."""
    if device.type != "cuda":
        call()
        return 0
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(each.message) for each in caught)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def speed(calls: dict[str, Callable[[], int]], tokens: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Tokens per second of each call, medians of calls by turns; prefill is part of them."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            _finish(device)
            start = time.perf_counter()
            call()
            _finish(device)
            taken[name].append(time.perf_counter() - start)
    return {name: tokens / median(seconds) for name, seconds in taken.items()}


def measure(name: str, device: torch.device, tiny: bool, tokens: int, repeats: int, seconds: float) -> dict[str, Any]:
    """Everything about one model. Raises RuntimeError where captured passes give something else than eager ones."""
    model = load(name, device, tiny)
    eager, graphs = HFTarget(model), GraphTarget(model)
    logits = compare(eager, graphs)
    if device.type == "cuda" and graphs.fallback is not None:
        raise RuntimeError(graphs.fallback)
    prompt = [(7 * k) % eager.vocab_size for k in range(64)]
    text = make_decoder(eager, None).generate(prompt, max_new_tokens=tokens + DEPTH + 2, ignore_eos=True)
    texts = [[*prompt, *text.token_ids]]
    calls = {
        f"{kind}, {drafts}": steps(make_decoder(target, known), prompt, tokens)
        for kind, target in (("eager", eager), ("graphs", graphs))
        for drafts, known in (("plain", None), ("drafts", texts))
    }
    for call in calls.values():
        call()
    gaps = {label: measure_gaps(call, device) for label, call in calls.items()}
    nodes, length = (1, 4, 8, 16, 32, 64), min(512, (eager.max_context or 512) // 2)
    curves = {
        kind: dict(zip(nodes, measure_curve(target, nodes, (length,), (1,), seconds=seconds).milliseconds[0][0],
                       strict=True))
        for kind, target in (("eager", eager), ("graphs", graphs))
    }  # fmt: skip
    roofline = measure_roofline(eager)
    return {
        "model": name, "tiny": tiny, "dtype": str(eager.dtype).removeprefix("torch."), "fallback": graphs.fallback,
        "captures": graphs.captures, "logits": logits, "gaps": gaps, "cached_tokens": length, "latency_ms": curves,
        "floor_ms": roofline.floor_ms(length), "bandwidth_gb_s": roofline.bandwidth_gb_s,
        "tokens_per_s": speed(calls, tokens, repeats, device),
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """What was measured of one model, as text."""
    lines = [f"{found['model']}{' (tiny)' if found['tiny'] else ''}, {found['dtype']}, {found['captures']} graphs"]
    worst = max(found["logits"], key=lambda row: row["difference"] / row["bound"] if row["bound"] else 0.0)
    lines.append(f"  logits: at most {worst['difference']:.3g} apart, rounding explains {worst['bound']:.3g}")
    plain = found["tokens_per_s"]["eager, plain"]
    for label, rate in found["tokens_per_s"].items():
        gap = found["gaps"][label]
        lines.append(
            f"  {label:15} {rate:9.1f} tok/s {rate / plain:5.2f}x   device idle {gap['idle']:4.0%}, "
            f"{gap['waits_per_pass']:.1f} waits and {gap['pieces_per_pass']:.0f} kernels a pass"
        )
    for kind, curve in found["latency_ms"].items():
        times = ", ".join(f"{nodes}: {ms:.2f}" for nodes, ms in curve.items())
        lines.append(f"  L(n) {kind}, ms: {times}")
    lines.append(f"  reading weights and {found['cached_tokens']} tokens once: {found['floor_ms']:.2f} ms")
    return "\n".join(lines)


@click.command()
@click.option("--model", "-m", "names", multiple=True, type=click.Choice(MODELS), help="Default: both.")
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:N; cpu with --tiny.")
@click.option("--tiny", is_flag=True, help="Tiny random weights in place of the models: tries the script out.")
@click.option("--tokens", default=256, show_default=True, type=click.IntRange(8), help="New tokens of a generation.")
@click.option("--repeats", default=5, show_default=True, type=click.IntRange(1), help="Generations of each kind.")
@click.option("--seconds", default=20.0, show_default=True, help="For each L(n).")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Write the result here.")
def gpu(
    names: tuple[str, ...], device: str, tiny: bool, tokens: int, repeats: int, seconds: float, json_path: Path | None
) -> None:
    """Captured CUDA graphs beside eager passes: the same logits, then idle time, L(n) and tokens per second."""
    where = torch.device(device)
    if (where.type == "cuda" and not torch.cuda.is_available()) or (where.type != "cuda" and not tiny):
        raise click.UsageError(NO_CUDA)
    results = []
    try:
        for name in names or MODELS:
            results.append(measure(name, where, tiny, tokens, repeats, seconds))
            click.echo(report(results[-1]))
    except RuntimeError as error:
        raise click.ClickException(str(error)) from error
    if where.type != "cuda":
        click.echo(CPU_NOTE)
    if json_path is not None:
        write_json(json_path, {
            "kind": "gpu", "commit": commit(), "command": sys.argv, "machine": machine(where), "versions": versions(),
            "publishable": where.type == "cuda" and not tiny, "models": results,
        })  # fmt: skip


if __name__ == "__main__":
    gpu()

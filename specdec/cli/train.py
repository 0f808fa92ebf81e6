"""``specdec train``: a drafter for a model, from the model's own text or from the user's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import click

from specdec.cli.console import escape_controls, note, slow_status
from specdec.cli.options import split_assignments
from specdec.registry import unknown

if TYPE_CHECKING:
    from specdec.target import HFTarget
    from specdec.training.features import FeatureProgress
    from specdec.training.synthesis import Progress
    from specdec.training.trainer import Evaluation, Step


@click.command()
@click.argument("name")
@click.option("-m", "--model", default="smollm2", show_default=True, help="Alias, folder or hub id of the target.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the weights.")
@click.option("--data", type=click.Path(path_type=Path), help="Jsonl of prompts or conversations; else its own.")
@click.option("--tokens", type=click.IntRange(min=1), default=200_000, show_default=True, help="Tokens of replies.")
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Texts and features; OUT/cache.")
@click.option("--dtype", default="auto", show_default=True, help="The target's: auto, fp32, bf16, fp16.")
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; PyTorch's choice by default.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of texts and training.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Texts at a time.")
@click.option("--reply-tokens", type=click.IntRange(min=2), default=256, show_default=True, help="Longest reply.")
@click.option("--texts-only", is_flag=True, help="Write the texts and stop.")
@click.option("--epochs", type=click.IntRange(min=1), default=1, show_default=True, help="Passes over the texts.")
@click.option("--batch-tokens", type=click.IntRange(min=2), default=4096, show_default=True, help="Of a step.")
@click.option("--max-len", type=click.IntRange(min=4), default=512, show_default=True, help="Tokens of a text used.")
@click.option("--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Batches of a step.")
@click.option("--lr", type=float, help="Highest learning rate; by default what suits the drafter.")
@click.option("--start", type=click.Path(path_type=Path, file_okay=False), help="Folder of weights to go on from.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted training.")
@click.option("--layers", type=click.IntRange(min=1), help="Layers of a draft model; short for -o layers=N.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="Option of the method; repeatable.")
def train(
    name: str,
    model: str,
    out: Path,
    data: Path | None,
    tokens: int,
    cache: Path | None,
    dtype: str,
    device: str,
    threads: int | None,
    seed: int,
    batch_size: int,
    reply_tokens: int,
    texts_only: bool,
    epochs: int,
    batch_tokens: int,
    max_len: int,
    accumulate: int,
    lr: float | None,
    start: Path | None,
    resume: bool,
    layers: int | None,
    options: tuple[str, ...],
) -> None:
    """Train the drafter NAME for a model and write its weights to a folder.

    Without --data the model writes prompts and answers itself. Texts and hidden states are kept in the cache, so a run
    that was interrupted goes on where it was, and another drafter for the same model starts with them.

    Several GPUs or processes: accelerate launch -m specdec.cli train ...
    """
    import torch

    from specdec.training.method import METHODS, method_class
    from specdec.training.run import (
        Reporter,
        TrainingRequest,
        make_accelerator,
        packed_copy,
        train_drafter,
        write_only,
    )
    from specdec.training.synthesis import SynthesisSettings
    from specdec.training.trainer import TrainerSettings

    if name not in METHODS:
        raise ValueError(unknown("trainable drafter", name, METHODS))
    rate = method_class(name).learning_rate if lr is None else lr
    request = TrainingRequest(
        drafter=name,
        model=model,
        out=out,
        cache=cache or out / "cache",
        tokens=tokens,
        data=data,
        options=split_assignments(options if layers is None else (*options, f"layers={layers}")),
        synthesis=SynthesisSettings(seed=seed, batch_size=batch_size, reply_tokens=reply_tokens),
        trainer=TrainerSettings(epochs=epochs, learning_rate=rate, accumulate=accumulate, seed=seed),
        batch_tokens=batch_tokens,
        max_len=max_len,
        resume=resume,
        start=start,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    show = Line()
    report = Reporter(
        note=show.note,
        writing=lambda done: show(describe_writing(done), always=done.tokens >= done.wanted),
        features=lambda done: show(describe_features(done), always=done.tokens == done.wanted),
        step=lambda done: show(describe_step(done), always=done.step == done.total),
    )
    if texts_only:
        target, tokenizer = load_target(model, dtype, device)
        write_only(request, packed_copy(target), tokenizer, report)
        return
    accelerator = make_accelerator(device)
    target, tokenizer = load_target(model, dtype, device if accelerator.num_processes == 1 else accelerator.device)
    evaluation = train_drafter(request, target, tokenizer, accelerator, report)
    if accelerator.is_main_process:
        show.end()
        click.echo(f"{out}: {describe_evaluation(evaluation)}")


def load_target(model: str, dtype: str, device: Any) -> tuple[HFTarget, Any | None]:
    """The target and its tokenizer, in bfloat16 where "auto" leaves the choice and the CPU computes in it."""
    with slow_status(f"loading {model}") as say:
        from specdec.models import find_device, load_model
        from specdec.target import HFTarget

        if dtype == "auto" and find_device(device).type == "cpu":
            dtype = "bf16" if has_fast_bfloat16() else "fp32"
        loaded = load_model(model, dtype=dtype, device=device, progress=say)
        return HFTarget(loaded.model), loaded.tokenizer


def has_fast_bfloat16() -> bool:
    """Whether this machine's CPU multiplies matrices in bfloat16 and has no GPU beside it."""
    import torch

    from specdec.benchmarks.record import machine

    flags = machine(torch.device("cpu"))["flags"]
    return not torch.cuda.is_available() and bool({"avx512_bf16", "amx_bf16"} & set(flags))


class Line:
    """One line on stderr that is replaced as work goes on; without a terminal, a new line now and then.

    Args:
        every: seconds between lines where there is no terminal.
        clock: tells the time in seconds.
    """

    def __init__(self, every: float = 30.0, clock: Callable[[], float] = monotonic) -> None:
        self._terminal = sys.stderr.isatty()
        self._every = every
        self._clock = clock
        self._due = -float("inf")
        self._width = 0

    def __call__(self, text: str, always: bool = False) -> None:
        """Show a text; ``always`` prints it where there is no terminal, however soon."""
        text = escape_controls(text)
        if self._terminal:
            click.echo("\r" + text.ljust(self._width), err=True, nl=False)
            self._width = len(text)
        elif always or self._clock() >= self._due:
            click.echo(text, err=True)
            self._due = self._clock() + self._every

    def note(self, text: str) -> None:
        """Print a remark on a line of its own."""
        self.end()
        note(text)

    def end(self) -> None:
        """Leave the line as it is."""
        if self._terminal and self._width:
            click.echo(err=True)
            self._width = 0


def describe_writing(progress: Progress) -> str:
    """One line on the writing of texts."""
    return _with_speed(f"texts: {progress.tokens}/{progress.wanted} tokens of replies", progress)


def describe_features(progress: FeatureProgress) -> str:
    """One line on the computing of hidden states."""
    return _with_speed(f"hidden states: {progress.tokens}/{progress.wanted} tokens", progress)


def describe_step(step: Step) -> str:
    """One line on the training."""
    parts = [f"step {step.step}/{step.total}", f"loss {step.loss:.3f}"]
    if step.evaluation is not None:
        parts.append(describe_evaluation(step.evaluation))
    return ", ".join([*parts, f"{duration(step.seconds_left)} left"])


def describe_evaluation(evaluation: Evaluation) -> str:
    """Held-out acceptance, and what it would come to."""
    rates = " ".join(f"{rate:.2f}" for rate in evaluation.acceptance)
    return f"held-out acceptance by depth {rates} (about tau {evaluation.expected_tau:.2f} as a chain)"


def _with_speed(text: str, progress: Progress | FeatureProgress) -> str:
    if progress.seconds_left is None:
        return text
    return f"{text}, {progress.tokens_per_second:.0f} tok/s, {duration(progress.seconds_left)} left"


def duration(seconds: float) -> str:
    """Seconds as hours and minutes, or minutes, or seconds."""
    if seconds >= 3600:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(0.0, seconds):.0f} s"

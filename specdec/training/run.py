"""A whole training run: texts, hidden states, training, saving."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from specdec.benchmarks.record import commit, machine, versions
from specdec.drafters.weights import TargetFacts, load_weights
from specdec.lean_stack import make_lean
from specdec.packing import can_pack, pack_linears
from specdec.registry import make_config
from specdec.target import HFTarget
from specdec.training.checkpoints import CheckpointFolder
from specdec.training.corpus import make_texts
from specdec.training.dataset import TrainingSet
from specdec.training.features import FeatureProgress, compute_features
from specdec.training.method import create_method, method_class
from specdec.training.shards import num_covered, plan_shards
from specdec.training.storage import writing
from specdec.training.synthesis import Progress, SynthesisSettings
from specdec.training.texts import TextStore, TrainingText, texts_sha256
from specdec.training.trainer import Evaluation, Step, Trainer, TrainerSettings, finite

FIT_BATCHES = 64
"""Batches that a method may fit its start to."""


@dataclass(frozen=True)
class TrainingRequest:
    """What to train, on what, where.

    Attributes:
        drafter: name of the method.
        model: name the target goes by, for the card.
        out: folder of the weights, the checkpoints and the curve.
        cache: folder of texts and hidden states; drafters of one target share it.
        tokens: tokens of replies to train on.
        data: jsonl of prompts or conversations; None for the target's own.
        options: options of the method.
        synthesis: how texts are written.
        trainer: how to train.
        batch_tokens: padded tokens of a batch.
        max_len: tokens of a text that are used.
        resume: go on from a checkpoint.
        start: folder of finished weights to go on from; None for a new drafter.
    """

    drafter: str
    model: str
    out: Path
    cache: Path
    tokens: int
    data: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    synthesis: SynthesisSettings = field(default_factory=SynthesisSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    batch_tokens: int = 4096
    max_len: int = 512
    resume: bool = False
    start: Path | None = None


@dataclass(frozen=True)
class Reporter:
    """What is told of a run, and to whom."""

    note: Callable[[str], None] = lambda _: None
    writing: Callable[[Progress], None] = lambda _: None
    features: Callable[[FeatureProgress], None] = lambda _: None
    step: Callable[[Step], None] = lambda _: None


def make_accelerator(device: str) -> Any:
    """``accelerate.Accelerator`` for this process: one of several under ``accelerate launch``, else alone.

    Arithmetic is bfloat16 autocast where CUDA or the CPU multiplies matrices in it, float32 elsewhere.
    """
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs  # type: ignore[import-untyped]

    on_cpu = device == "cpu" or not torch.cuda.is_available()
    flags = set(machine(torch.device("cpu"))["flags"])
    bfloat16 = bool({"amx_bf16", "avx512_bf16"} & flags) if on_cpu else torch.cuda.is_bf16_supported()
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="bf16" if bfloat16 else "no",
        kwargs_handlers=[
            # The others wait while the first process writes texts and hidden states.
            InitProcessGroupKwargs(timeout=timedelta(days=7)),
            DistributedDataParallelKwargs(find_unused_parameters=True),
        ],
    )


def train_drafter(
    request: TrainingRequest, target: HFTarget, tokenizer: Any | None, accelerator: Any, report: Reporter
) -> Evaluation:
    """Train a drafter and write its folder.

    Args:
        request: what is wanted.
        target: the model, on this process' device.
        tokenizer: its tokenizer; None for a model that comes without.
        accelerator: as ``make_accelerator`` gives it.
        report: told how it goes; in the first process only.

    Raises:
        ValueError: for a request that cannot be served, damaged files, a full disk.
    """
    if not request.resume and CheckpointFolder(request.out / "checkpoints", {}).steps():
        raise ValueError(f"{request.out} holds an unfinished training: go on with --resume, or delete its checkpoints")
    torch.manual_seed(request.trainer.seed)
    method = create_method(request.drafter, target, request.options)
    with writing(request.out):
        request.out.mkdir(parents=True, exist_ok=True)
    report = report if accelerator.is_main_process else Reporter()
    with _first_process_first(accelerator):
        fast = packed_copy(target)
        store = write_only(request, fast, tokenizer, report)
        texts = store.first(request.tokens)
        shards = plan_shards(store.texts, request.max_len)
        covered = store.texts[: num_covered(shards, len(texts))]
        folder = request.cache / "features"
        features = compute_features(fast, covered, folder, method.features, request.max_len, report.features)
        if accelerator.is_main_process:
            features.check(method.features)
    data = TrainingSet(
        texts,
        features,
        method.features,
        max_len=request.max_len,
        batch_tokens=request.batch_tokens,
        seed=request.trainer.seed,
    )
    torch.manual_seed(request.trainer.seed)
    method.prepare(data.token_counts(target.vocab_size))
    if request.start is None:
        method.fit(data.batch(step) for step in range(min(FIT_BATCHES, data.num_batches(0))))
    else:
        method.start_from(load_weights(request.start))
    about = describe_run(request, target, store, texts, data)
    trainer = Trainer(method, data, request.trainer, request.out, about, accelerator, target.device)
    evaluation = trainer.run(request.resume, report.step)
    if accelerator.is_main_process:
        with writing(request.out):
            method.save(request.out, collect_facts(about, trainer, evaluation, target))
        trainer.finish()
    accelerator.wait_for_everyone()
    return evaluation


def write_only(request: TrainingRequest, target: HFTarget, tokenizer: Any | None, report: Reporter) -> TextStore:
    """Write the texts of a run to its cache; a packed target writes faster. Arguments as ``train_drafter``."""
    store = make_texts(
        target, tokenizer, request.cache, request.synthesis, request.tokens, request.data,
        report.writing, report.note,
    )  # fmt: skip
    report.note(f"{len(store.texts)} texts, {store.num_reply_tokens} tokens of replies in {store.path}")
    if store.dropped:
        report.note("dropped: " + ", ".join(f"{reason} {count}" for reason, count in store.dropped.most_common()))
    return store


def packed_copy(target: HFTarget) -> HFTarget:
    """The target with weights laid out for the CPU, where that helps; training itself needs them as they are."""
    if not can_pack(target.model):
        return target
    model = copy.deepcopy(target.model)
    pack_linears(model)
    make_lean(model)
    return HFTarget(model)


@contextmanager
def _first_process_first(accelerator: Any) -> Iterator[None]:
    """The block runs in the first process, then in the others, which find its files."""
    if not accelerator.is_main_process:
        accelerator.wait_for_everyone()
    yield
    if accelerator.is_main_process:
        accelerator.wait_for_everyone()


def describe_run(
    request: TrainingRequest, target: HFTarget, store: TextStore, texts: Sequence[TrainingText], data: TrainingSet
) -> dict[str, Any]:
    """What a run was asked for and trains on: a run is resumed only where this is the same."""
    options = make_config(method_class(request.drafter).Options, request.options, request.drafter)
    return {
        "drafter": request.drafter,
        "target": request.model,
        "target_facts": asdict(TargetFacts.of(target)),
        "dtype": str(target.dtype).removeprefix("torch."),
        "options": asdict(options),
        "texts": {
            "count": len(texts),
            "held_out": len(data.held_out),
            "reply_tokens": sum(len(text.reply_ids) for text in texts),
            "sha256": texts_sha256(texts),
            "data": store.origin["data"],
            "synthesis": store.origin["settings"],
        },
        "start": None if request.start is None else _before(request.start),
        "batch_tokens": request.batch_tokens,
        "max_len": request.max_len,
    }


def _before(folder: Path) -> dict[str, Any]:
    """What is to be known of weights that a training goes on from."""
    facts = load_weights(folder).facts
    wanted = ("commit", "texts", "tokens", "seconds", "options", "trainer", "start")
    return {name: facts[name] for name in wanted if name in facts}


def collect_facts(
    about: Mapping[str, Any], trainer: Trainer, evaluation: Evaluation, target: HFTarget
) -> dict[str, Any]:
    """What is to be known of finished weights: ``describe_run``'s, how it went, and with what."""
    found = machine(target.device)
    return {
        **about,
        "trainer": asdict(trainer.settings),
        "steps": trainer.step,
        "skipped": trainer.skipped,
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds),
        "held_out": {**finite(asdict(evaluation)), "expected_tau": evaluation.expected_tau},
        "curve": trainer.curve,
        "commit": commit(),
        "versions": versions(),
        "machine": {name: found[name] for name in ("cpu", "cores", "threads", "gpu")},
    }

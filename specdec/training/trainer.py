"""The training loop: steps, live held-out acceptance, checkpoints, and a learning curve."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn

from specdec.files import write_atomically
from specdec.sampling import derive_seed
from specdec.training.checkpoints import Checkpoint, CheckpointFolder, pack_state, unpack_state
from specdec.training.dataset import TrainingSet
from specdec.training.method import Method, TrainingBatch, expected_tau
from specdec.training.optimizer import MuonAdamW
from specdec.training.storage import writing

FITTED_SHARE = 0.1
"""Of the learning rate, for parameters that start from a closed form."""
MOST_SKIPPED = 10
"""Steps in a row whose loss or gradient may be no number before training stops."""

RANKS = 10
"""Ranks of a guess that are told apart."""


@dataclass(frozen=True)
class TrainerSettings:
    """How to train.

    Attributes:
        epochs: passes over the texts.
        learning_rate: the highest, reached after the warm-up.
        warmup: share of the steps in which the rate rises to it.
        final_rate: the rate at the end of the cosine, as a share of the highest.
        beta1: AdamW's.
        beta2: AdamW's.
        weight_decay: AdamW's, on matrices only.
        clip: largest norm of the gradient.
        accumulate: batches of a step.
        evaluations: how often in a run the held-out texts are looked at, the end included.
        evaluation_tokens: how many of their tokens while training goes on; the last look takes all.
        checkpoint_seconds: time between checkpoints.
        seed: of all that is random.
    """

    epochs: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.05
    final_rate: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    evaluations: int = 12
    evaluation_tokens: int = 10_000
    checkpoint_seconds: float = 180.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate", "evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0.0 < self.learning_rate < math.inf:
            raise ValueError(f"the learning rate must be above 0, got {self.learning_rate}")

    def rate(self, step: int, total: int) -> float:
        """The learning rate of a step: linear warm-up, then half a cosine."""
        warm = max(1, round(self.warmup * total))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        progress = (step - warm) / max(1, total - warm)
        falling = 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.learning_rate * (self.final_rate + (1.0 - self.final_rate) * falling)


@dataclass(frozen=True)
class Evaluation:
    """What the held-out texts say.

    Attributes:
        loss: mean over positions.
        acceptance: per draft depth, how often the first guess is right, the true tokens before it given.
        hit_rates: ``[D][R]``, the same for each rank of a guess.
        positions: positions looked at per depth.
    """

    loss: float
    acceptance: list[float]
    hit_rates: list[list[float]]
    positions: list[int]

    @property
    def expected_tau(self) -> float:
        """Estimate of tokens per target pass of a greedy chain."""
        return expected_tau(self.acceptance)


@dataclass(frozen=True)
class Step:
    """What a step reports.

    Attributes:
        step: steps done.
        total: steps in all.
        tokens: reply tokens trained on so far.
        loss: of this step; NaN where it was skipped.
        evaluation: the latest, None before the first.
        seconds_left: estimate from the speed of this run.
    """

    step: int
    total: int
    tokens: int
    loss: float
    evaluation: Evaluation | None
    seconds_left: float


class Trainer:
    """Trains a method on texts. A resumed run ends in the bits the uninterrupted one would have, on the same threads.

    Every step is a function of the weights, the optimizer's moments and the step's number: its texts are looked up and
    its random numbers seeded by the number.

    Args:
        method: what learns; prepared already.
        data: what from.
        settings: how.
        out: folder for ``checkpoints/`` and ``curve.jsonl``.
        identity: what the run was asked for; only a run asked for the same may be resumed.
        accelerator: ``accelerate.Accelerator``: processes and autocast.
        device: where the target and the module are.
    """

    def __init__(
        self,
        method: Method,
        data: TrainingSet,
        settings: TrainerSettings,
        out: Path,
        identity: Mapping[str, Any],
        accelerator: Any,
        device: torch.device,
    ) -> None:
        self.method = method
        self._device = device
        self._data = data
        self.settings = settings
        self._accelerator = accelerator
        self._curve_path = out / "curve.jsonl"
        identity = {**identity, "trainer": _of_result(settings), "processes": accelerator.num_processes}
        self._checkpoints = CheckpointFolder(out / "checkpoints", json.loads(json.dumps(identity)))
        method.module.to(device)
        self._wrapped = accelerator.prepare(_Loss(method), device_placement=[False])
        self._optimizer = make_optimizer(method, settings, device)
        batches_per_step: int = settings.accumulate * accelerator.num_processes
        self.total = max(1, data.total_batches(settings.epochs) // batches_per_step)
        self.step, self.tokens, self.skipped = 0, 0, 0
        self.curve: list[dict[str, Any]] = []
        self._skipped_in_row = 0
        self._losses: list[float] = []  # since the latest evaluation
        self._seconds_before = 0.0
        self._began = monotonic()
        self._evaluation: Evaluation | None = None

    @property
    def seconds(self) -> float:
        """Time spent in training, in runs before this one as well."""
        return self._seconds_before + monotonic() - self._began

    def run(self, resume: bool, progress: Callable[[Step], None] | None = None) -> Evaluation:
        """Train to the end.

        Args:
            resume: go on from the newest checkpoint, if there is one.
            progress: told after every step.

        Returns:
            The held-out texts' verdict on the finished drafter.

        Raises:
            ValueError: when there are checkpoints and ``resume`` is not set, they are of another run, the loss is no
                number time and again, or the disk is full.
        """
        self._began = monotonic()
        self._start(resume)
        main, first = self._accelerator.is_main_process, self.step
        began = saved = monotonic()
        if self.step == 0:
            self._evaluate(self.settings.evaluation_tokens)
        while self.step < self.total:
            loss = self._train_step()
            self.step += 1
            last = self.step == self.total
            if last or self._evaluates_at(self.step):
                self._evaluate(None if last else self.settings.evaluation_tokens)
            if main and not last and monotonic() - saved >= self.settings.checkpoint_seconds:
                self._save()
                saved = monotonic()
            if progress is not None:
                left = (monotonic() - began) / (self.step - first) * (self.total - self.step)
                progress(Step(self.step, self.total, self.tokens, loss, self._evaluation, left))
        if main:
            self._save()
        assert self._evaluation is not None
        return self._evaluation

    def finish(self) -> None:
        """Delete the checkpoints: the weights are where they belong."""
        self._checkpoints.remove()

    def _start(self, resume: bool) -> None:
        found = self._checkpoints.load() if resume else None
        if found is None:
            if self._checkpoints.steps():
                raise ValueError(
                    f"{self._checkpoints.folder} holds an unfinished training: go on with --resume, or delete it"
                )
            self._write_curve()
            return
        unpack_state(found.tensors, self.method.module, self._optimizer)
        self.step, self.tokens, self.skipped = found.step, found.state["tokens"], found.state["skipped"]
        self._skipped_in_row = found.state["skipped_in_row"]
        self._seconds_before = found.state["seconds"]
        self.curve = list(found.state["curve"])
        self._losses = list(found.state["losses"])
        self._evaluation = _evaluation_of(found.state["evaluation"])
        self._write_curve()

    def _save(self) -> None:
        state = {
            "tokens": self.tokens,
            "skipped": self.skipped,
            "skipped_in_row": self._skipped_in_row,
            "seconds": self.seconds,
            "curve": self.curve,
            "losses": self._losses,
            "evaluation": None if self._evaluation is None else finite(asdict(self._evaluation)),
        }
        self._checkpoints.save(Checkpoint(self.step, state, pack_state(self.method.module, self._optimizer)))

    def _train_step(self) -> float:
        """One optimizer step over ``accumulate`` batches a process; the loss, NaN where the step was skipped."""
        settings, accelerator = self.settings, self._accelerator
        for group in self._optimizer.param_groups:
            group["lr"] = group["share"] * settings.rate(self.step, self.total)
        self._optimizer.zero_grad(set_to_none=True)
        self.method.module.train()
        losses = []
        for part in range(settings.accumulate):
            index = (self.step * settings.accumulate + part) * accelerator.num_processes
            texts = [self._data.indices(index + process) for process in range(accelerator.num_processes)]
            self.tokens += sum(map(self._data.num_reply_tokens, texts))
            index += accelerator.process_index
            torch.manual_seed(derive_seed(settings.seed, index) >> 1)
            batch = self._data.batch(index).to(self._device)
            holds_back = part < settings.accumulate - 1 and accelerator.num_processes > 1
            with accelerator.no_sync(self._wrapped) if holds_back else nullcontext():
                loss = self._wrapped(batch)
                accelerator.backward(loss / settings.accumulate)
            losses.append(loss.detach().float())
        norm = nn.utils.clip_grad_norm_(self.method.module.parameters(), settings.clip)
        mean = torch.stack(losses).mean()
        if accelerator.num_processes > 1:
            mean = accelerator.reduce(mean, "mean")
        if bool(mean.isfinite()) and bool(norm.isfinite()):
            self._optimizer.step()
            self._skipped_in_row = 0
            self._losses.append(float(mean))
            return self._losses[-1]
        self.skipped += 1
        self._skipped_in_row += 1
        if self._skipped_in_row == MOST_SKIPPED:
            raise ValueError(
                f"the loss or its gradient was no number in {MOST_SKIPPED} steps in a row, up to step {self.step + 1}: "
                f"try a lower --lr than {settings.learning_rate}"
            )
        return math.nan

    def _evaluates_at(self, step: int) -> bool:
        """Whether held-out texts are looked at after a step: ``evaluations`` times, evenly spread."""
        count = min(self.settings.evaluations, self.total)
        return step * count // self.total > (step - 1) * count // self.total

    def _evaluate(self, max_tokens: int | None) -> None:
        """Look at the held-out texts and extend the curve."""
        with self._accelerator.autocast():
            self._evaluation = evaluate(self.method, self._data, self._device, max_tokens, self.settings.seed)
        self.curve.append(
            {
                "step": self.step,
                "tokens": self.tokens,
                "seconds": round(self.seconds, 1),
                "loss": _rounded(sum(self._losses) / len(self._losses)) if self._losses else None,
                "held_out_loss": _rounded(self._evaluation.loss),
                "acceptance": [_rounded(rate) for rate in self._evaluation.acceptance],
                "expected_tau": _rounded(self._evaluation.expected_tau),
            }
        )
        self._losses = []
        self._write_curve()

    def _write_curve(self) -> None:
        if self._accelerator.is_main_process:
            with writing(self._curve_path):
                self._curve_path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(self._curve_path, "".join(json.dumps(point) + "\n" for point in self.curve))


class _Loss(nn.Module):
    """The method's loss as a forward pass, so that several processes can share its gradients."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.module = method.module
        self._loss = method.loss

    def forward(self, batch: TrainingBatch) -> Tensor:
        return self._loss(batch)[0]


@torch.no_grad()
def evaluate(
    method: Method, data: TrainingSet, device: torch.device, max_tokens: int | None = None, seed: int = 0
) -> Evaluation:
    """Loss and hits on held-out texts; a function of the weights and the arguments alone.

    Args:
        method: what is looked at.
        data: whose held-out texts.
        device: where to compute.
        max_tokens: of the held-out texts, about; None for all.
        seed: for methods that draw what they look at.
    """
    method.module.eval()
    loss, positions = 0.0, 0
    hits = totals = torch.zeros(0)
    for index, cpu_batch in enumerate(data.held_out_batches(max_tokens)):
        batch = cpu_batch.to(device)
        torch.manual_seed(derive_seed(seed + 1, index) >> 1)
        value, count = method.loss(batch)
        loss, positions = loss + float(value) * count if count else loss, positions + count
        found, seen = method.hits(batch, RANKS)
        hits = found.cpu().double() if not hits.numel() else hits + found.cpu()
        totals = seen.cpu().double() if not totals.numel() else totals + seen.cpu()
    rates = hits / totals.clamp(min=1).unsqueeze(1)  # [D, R]
    return Evaluation(
        loss=loss / max(1, positions),
        acceptance=rates[:, 0].tolist(),
        hit_rates=rates.tolist(),
        positions=[int(total) for total in totals.tolist()],
    )


def _of_result(settings: TrainerSettings) -> dict[str, Any]:
    """The settings that the result depends on."""
    return {name: value for name, value in asdict(settings).items() if name != "checkpoint_seconds"}


def finite(evaluation: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no infinite numbers."""
    loss = evaluation["loss"]
    return {**evaluation, "loss": loss if math.isfinite(loss) else None}


def _evaluation_of(stored: Mapping[str, Any] | None) -> Evaluation | None:
    """What ``finite`` made."""
    if stored is None:
        return None
    return Evaluation(**{**stored, "loss": math.nan if stored["loss"] is None else stored["loss"]})


def _rounded(value: float) -> float | None:
    return round(value, 5) if math.isfinite(value) else None


def make_optimizer(method: Method, settings: TrainerSettings, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, or Muon for matrices where the method asks for it."""
    betas, groups = (settings.beta1, settings.beta2), make_groups(method, settings)
    if method.muon:
        return MuonAdamW(groups, lr=settings.learning_rate, betas=betas)
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=fused)


def make_groups(method: Method, settings: TrainerSettings) -> list[dict[str, Any]]:
    """Parameters by what they have in common: weight decay, for matrices alone, and their share of the rate."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in method.module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.ndim > 1, name.startswith(method.fitted)), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": settings.weight_decay if matrix else 0.0,
            "share": FITTED_SHARE if fitted else 1.0,
            "matrices": matrix,
        }
        for (matrix, fitted), parameters in groups.items()
    ]

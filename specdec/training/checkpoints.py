"""Checkpoints of a training run: folders that are there whole or not at all, without pickles."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdec.benchmarks.record import differences
from specdec.files import sync_folder
from specdec.training.storage import read_json, to_json, writing

KEPT = 2
"""Checkpoints that are kept; the older one is there should the newest be damaged."""

_FOLDER = re.compile(r"step-(\d+)")
_TENSORS, _STATE = "state.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """Where a run stood.

    Attributes:
        step: optimizer steps done, skipped ones included.
        state: what the trainer wants to remember, JSON.
        tensors: weights as ``module.<name>``, the optimizer's moments as ``<moment>.<parameter>``.
    """

    step: int
    state: dict[str, Any]
    tensors: dict[str, Tensor]


class CheckpointFolder:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        identity: what the run was asked for; a run is only continued with the same.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = identity

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, ascending."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(found[1]) for name in names if (found := _FOLDER.fullmatch(name)))

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, on disk when this returns, and remove those no longer kept."""
        final = self._path(checkpoint.step)
        scratch = self.folder / f".{final.name}.tmp"
        with writing(final):
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            try:
                save_file(checkpoint.tensors, scratch / _TENSORS)
                document = {"identity": self._identity, "step": checkpoint.step, "state": checkpoint.state}
                (scratch / _STATE).write_text(to_json(document), encoding="utf-8")
                for path in scratch.iterdir():
                    with path.open("rb+") as file:
                        os.fsync(file.fileno())
                shutil.rmtree(final, ignore_errors=True)
                os.replace(scratch, final)
            except BaseException:
                shutil.rmtree(scratch, ignore_errors=True)
                raise
            sync_folder(self.folder)
        for step in self.steps()[:-KEPT]:
            shutil.rmtree(self._path(step), ignore_errors=True)

    def load(self) -> Checkpoint | None:
        """The newest checkpoint, None where there is none.

        Raises:
            ValueError: when it is damaged, or of a run that was asked for something else.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self._path(steps[-1])
        remedy = f"delete {path} to go on from the checkpoint before it"
        document = read_json(path / _STATE, remedy)
        differing = differences(document.get("identity"), self._identity)
        if differing:
            raise ValueError(f"{path} is of another run, it cannot be resumed: {'; '.join(differing)}")
        try:
            tensors = load_file(path / _TENSORS)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path / _TENSORS} is damaged ({error}): {remedy}") from error
        return Checkpoint(int(document["step"]), document["state"], tensors)

    def remove(self) -> None:
        """Delete all of them: the run is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def pack_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights, buffers and the optimizer's state as named tensors."""
    tensors = {f"module.{name}": value.detach().cpu().clone() for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{moment}.{name}"] = torch.as_tensor(value).detach().cpu().clone()
    return tensors


def unpack_state(tensors: Mapping[str, Tensor], module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put back what ``pack_state`` took.

    Raises:
        ValueError: when the tensors are of another module.
    """
    weights = {name.removeprefix("module."): value for name, value in tensors.items() if name.startswith("module.")}
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint is of another module: {error}") from error
    for name, parameter in module.named_parameters():
        state = {key.removesuffix(f".{name}"): value for key, value in tensors.items() if key.endswith(f".{name}")}
        state = {moment: value for moment, value in state.items() if "." not in moment and moment != "module"}
        if state:
            optimizer.state[parameter] = {
                moment: value.clone() if moment == "step" else value.to(parameter.device)
                for moment, value in state.items()
            }

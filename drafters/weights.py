"""A trained drafter's weights: a folder with config.json, model.safetensors and a model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from specdec.files import whole_file, write_atomically
from specdec.target import HFTarget

FORMAT = 1
"""Version of the folder's layout."""

PRETRAINED = Path(__file__).resolve().parent / "pretrained"
"""Where the weights lie that ship with the package, one folder per drafter."""

_CONFIG, _TENSORS, _CARD = "config.json", "model.safetensors", "README.md"
_SCALE = "::scale"
_SMALLEST_QUANTIZED = 4096
_MOST_QUANTIZATION_ERROR = 0.02
"""Of a matrix in int8, as a share of its norm. Where one large entry sets the scale of its row, as in an identity that
has learnt, all the small ones would be rounded away; such a matrix stays bfloat16."""


@dataclass(frozen=True)
class TargetFacts:
    """What of a target a drafter depends on.

    Attributes:
        architecture: its class.
        hidden_size: width of its hidden states, d.
        vocab_size: V.
        num_layers: decoder layers.
        fingerprint: of some of its weights, the same in every precision.
    """

    architecture: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    fingerprint: str

    @classmethod
    def of(cls, target: HFTarget) -> TargetFacts:
        """The facts of a loaded target."""
        table = target.model.get_input_embeddings().weight
        parameters = target.model.named_parameters()
        named = {name: value for name, value in parameters if is_fingerprint_vector(name, value.ndim)}
        return cls(
            architecture=type(target.model).__name__,
            hidden_size=int(target.config.hidden_size),
            vocab_size=target.vocab_size,
            num_layers=target.num_layers,
            fingerprint=fingerprint(table[fingerprint_rows(table.shape[0])], (named[name] for name in sorted(named))),
        )

    def difference(self, other: TargetFacts) -> str | None:
        """Where drafters for the one cannot run with the other, in words; None where they can."""
        for name in ("hidden_size", "vocab_size", "num_layers"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} {mine}, not {theirs}"
        return None


@dataclass(frozen=True)
class DrafterWeights:
    """What a folder holds.

    Attributes:
        drafter: name of the drafter.
        target: what it was trained for.
        shape: arguments of its module.
        tensors: the module's state.
        facts: how it was trained, for the card.
        hit_rates: ``[D][R]`` chance that the rank-r guess at depth d + 1 is right, given the right path to it; empty
            where it was not calibrated.
    """

    drafter: str
    target: TargetFacts
    shape: dict[str, Any]
    tensors: dict[str, Tensor] = field(repr=False)
    facts: dict[str, Any] = field(default_factory=dict)
    hit_rates: Sequence[Sequence[float]] = ()

    def load_into(self, module: nn.Module) -> None:
        """Copy the tensors into a module.

        Raises:
            ValueError: naming the first tensor that is missing, unknown or of another shape.
        """
        state = module.state_dict()
        for name in sorted(state.keys() | self.tensors.keys()):
            if name not in self.tensors:
                raise ValueError(f"the weights of drafter {self.drafter!r} lack the tensor {name!r}")
            if name not in state:
                raise ValueError(f"the weights of drafter {self.drafter!r} hold an unknown tensor {name!r}")
            if state[name].shape != self.tensors[name].shape:
                raise ValueError(
                    f"tensor {name!r} of drafter {self.drafter!r} is {tuple(self.tensors[name].shape)}, its module "
                    f"wants {tuple(state[name].shape)}"
                )
        module.load_state_dict(self.tensors)


def save_weights(folder: Path, weights: DrafterWeights, card: str, quantize: bool = False) -> None:
    """Write a folder; every file is there whole or not at all, config.json last.

    Args:
        folder: made where it is missing.
        weights: what to write.
        card: text of the model card, Markdown.
        quantize: store matrices as int8 with a scale per output row, a quarter of float32, where that keeps them within
            2 % of their norm; other matrices and vectors are bfloat16.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, Tensor] = {}
    for name, tensor in weights.tensors.items():
        stored.update(_pack(name, tensor, quantize))
    with whole_file(folder / _TENSORS) as temporary:
        save_file(stored, temporary, metadata={"format": "pt"})
    write_atomically(folder / _CARD, card)
    write_config(folder, weights)


def write_config(folder: Path, weights: DrafterWeights) -> None:
    """Write config.json alone, as calibration does."""
    document = {
        "format": FORMAT,
        "drafter": weights.drafter,
        "target": asdict(weights.target),
        "shape": weights.shape,
        "facts": weights.facts,
        "hit_rates": [[round(float(rate), 4) for rate in rates] for rates in weights.hit_rates],
    }
    write_atomically(folder / _CONFIG, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def load_weights(folder: Path) -> DrafterWeights:
    """Read a folder that ``save_weights`` wrote; int8 matrices come back as float32.

    Raises:
        ValueError: naming the file that is missing or damaged.
    """
    config = read_config(folder)
    path = folder / _TENSORS
    if not path.is_file():
        raise ValueError(f"{folder} has no {_TENSORS}: the weights of drafter {config['drafter']!r} are missing")
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or truncated ({error}): fetch or train it again") from error
    try:
        return DrafterWeights(
            drafter=config["drafter"],
            target=TargetFacts(**config["target"]),
            shape=dict(config["shape"]),
            tensors=_unpack(stored),
            facts=dict(config.get("facts", {})),
            hit_rates=config.get("hit_rates", ()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / _CONFIG} is damaged ({error}): fetch or train the drafter again") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The checked ``config.json`` of a folder."""
    path = folder / _CONFIG
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give the folder `specdec train` wrote") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): fetch or train the drafter again") from error
    if not isinstance(config, dict) or not {"drafter", "target", "shape"} <= config.keys():
        raise ValueError(f"{path} is no drafter's configuration: it lacks 'drafter', 'target' or 'shape'")
    if config.get("format") != FORMAT:
        raise ValueError(f"{path} has format {config.get('format')!r}, this version reads {FORMAT}")
    return config


def find_pretrained(drafter: str, target: TargetFacts, root: Path | None = None) -> Path | None:
    """The folder of shipped weights of a drafter for this very target; None where there are none."""
    root = PRETRAINED if root is None else root
    for folder in sorted(root.glob(f"{drafter}*")) if root.is_dir() else []:
        try:
            config = read_config(folder)
        except ValueError:
            continue
        if config["drafter"] == drafter and config["target"].get("fingerprint") == target.fingerprint:
            return folder
    return None


def find_weights(drafter: str, folder: str, target: TargetFacts) -> Path:
    """Where the weights lie that a drafter asks for.

    Args:
        drafter: its name.
        folder: where they lie; "" for those that ship for the target.
        target: what they must fit; ``check_weights`` sees to it.

    Raises:
        ValueError: where none ship.
    """
    if folder:
        return Path(folder).expanduser()
    found = find_pretrained(drafter, target)
    if found is None:
        raise ValueError(
            f"no weights of drafter {drafter!r} ship for this {target.architecture}: train them "
            f"(specdec train {drafter} --model MODEL --out DIR) and pass -o weights=DIR"
        )
    return found


def check_weights(weights: DrafterWeights, drafter: str, target: TargetFacts) -> None:
    """Raise ValueError where weights are of another drafter or for another target."""
    if weights.drafter != drafter:
        raise ValueError(f"these are weights of drafter {weights.drafter!r}, not of {drafter!r}")
    difference = weights.target.difference(target)
    if difference is not None:
        raise ValueError(f"the weights of drafter {drafter!r} are for another target: {difference}")


def fingerprint_rows(vocab_size: int) -> list[int]:
    """The embeddings that a target is known by."""
    return [number * vocab_size // 64 for number in range(64)]


def is_fingerprint_vector(name: str, num_dims: int) -> bool:
    """Whether a parameter is one of the vectors that a target is known by: they survive a change of precision."""
    return num_dims == 1 and "norm" in name


def fingerprint(embeddings: Tensor, vectors: Iterable[Tensor]) -> str:
    """What a target is known by.

    Args:
        embeddings: ``[64, d]``, those of ``fingerprint_rows``.
        vectors: those of ``is_fingerprint_vector``, by name.
    """
    digest = hashlib.sha256()
    for tensor in (embeddings, *vectors):
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _pack(name: str, tensor: Tensor, quantize: bool) -> dict[str, Tensor]:
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        return {name: tensor}
    if not quantize or tensor.ndim < 2 or tensor.numel() < _SMALLEST_QUANTIZED:
        return {name: tensor.to(torch.bfloat16)}
    exact = tensor.float()
    scale = exact.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127.0
    rounded = (exact / scale).round()
    if float((rounded * scale - exact).norm()) > _MOST_QUANTIZATION_ERROR * float(exact.norm()):
        return {name: tensor.to(torch.bfloat16)}
    return {name: rounded.to(torch.int8), name + _SCALE: scale.squeeze(-1)}


def _unpack(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALE):
            continue
        scale = stored.get(name + _SCALE)
        tensors[name] = tensor if scale is None else tensor.float() * scale.unsqueeze(-1)
    return tensors

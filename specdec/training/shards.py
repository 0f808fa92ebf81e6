"""Hidden states on disk: one file per feature and shard, checksummed, read through memory maps."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.files import whole_file, write_atomically
from specdec.target import Feature
from specdec.training.storage import read_json, to_json, writing
from specdec.training.texts import TrainingText

FORMAT = 1
"""Version of the layout."""

SHARD_TOKENS = 32_768
"""Tokens of a shard; the last text may exceed it."""

_TENSOR = "features"


@dataclass(frozen=True)
class Shard:
    """Consecutive texts whose hidden states lie in one file.

    Attributes:
        index: number of the shard.
        first: index of its first text.
        lengths: tokens of each of its texts.
        digest: hash of the texts, so that features are never taken for those of others.
    """

    index: int
    first: int
    lengths: tuple[int, ...]
    digest: str

    @property
    def num_tokens(self) -> int:
        """Rows of the shard's tensors."""
        return sum(self.lengths)

    def describe(self) -> dict[str, Any]:
        """As the manifest holds it."""
        return {"texts": len(self.lengths), "tokens": self.num_tokens, "digest": self.digest}


def plan_shards(texts: Sequence[TrainingText], max_len: int) -> list[Shard]:
    """Cut texts into shards. Texts appended later change only the last one.

    Args:
        texts: all texts.
        max_len: tokens of a text that are used, >= 2.
    """
    shards: list[Shard] = []
    first, lengths, digest = 0, [0] * 0, hashlib.sha256()
    for index, text in enumerate(texts):
        lengths.append(min(len(text), max_len))
        digest.update(text.key.encode())
        if sum(lengths) >= SHARD_TOKENS or index == len(texts) - 1:
            shards.append(Shard(len(shards), first, tuple(lengths), digest.hexdigest()))
            first, lengths, digest = index + 1, [], hashlib.sha256()
    return shards


def num_covered(shards: Sequence[Shard], count: int) -> int:
    """Texts in the shards that hold the first ``count``: whole shards serve runs on more texts as well."""
    return max((shard.first + len(shard.lengths) for shard in shards if shard.first < count), default=0)


class FeatureStore:
    """Hidden states of all texts: ``FOLDER/<feature>/00012.safetensors`` with a ``manifest.json`` beside them.

    The manifest is replaced atomically after each shard, so what it lists is whole, a crash at any time included.

    Args:
        folder: the cache's feature folder.
        shards: how the texts are cut.
        origin: what the features depend on besides the texts: the target's facts, its dtype.

    Raises:
        ValueError: when a manifest is damaged or of another origin.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], origin: Mapping[str, Any]) -> None:
        self._folder = folder
        self._shards = list(shards)
        self._origin = dict(origin)
        self._manifests: dict[Feature, dict[str, Any]] = {}
        self._open: dict[Path, Any] = {}
        self._place: list[tuple[int, int, int]] = []  # text -> shard, first row, end row
        for shard in self._shards:
            row = 0
            for length in shard.lengths:
                self._place.append((shard.index, row, row + length))
                row += length

    def missing(self, shard: Shard, names: Sequence[Feature]) -> list[Feature]:
        """Features that are still to be computed for a shard."""
        return [name for name in names if self._entry(name, shard) is None]

    def write(self, shard: Shard, name: Feature, states: Tensor) -> None:
        """Add a shard of a feature; it is on disk when this returns.

        Args:
            shard: which.
            name: of the feature.
            states: ``[n_tokens, d]``, the texts one after the other.
        """
        path = self._path(name, shard)
        states = states.detach().cpu().contiguous()
        if states.shape[0] != shard.num_tokens:
            raise ValueError(f"shard {shard.index} has {shard.num_tokens} tokens, got {states.shape[0]} states")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                save_file({_TENSOR: states}, temporary)
            manifest = self._manifest(name)
            manifest["shards"][str(shard.index)] = {
                **shard.describe(),
                "bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
            write_atomically(path.parent / "manifest.json", to_json(manifest))
        self._open.pop(path, None)

    def check(self, names: Sequence[Feature], progress: Callable[[int, int], None] | None = None) -> None:
        """Compare every file with its checksum.

        Args:
            names: features that will be read.
            progress: told how many of how many files were looked at.

        Raises:
            ValueError: naming the file that is missing, truncated or altered, and what to do.
        """
        files = [(name, shard) for name in names for shard in self._shards]
        for done, (name, shard) in enumerate(files):
            if progress is not None:
                progress(done, len(files))
            path, entry = self._path(name, shard), self._entry(name, shard)
            if entry is None:
                raise ValueError(f"{path} was not computed yet: run the training again")
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                fault = "is missing"
            elif size != entry["bytes"]:
                fault = f"is truncated or altered ({size} bytes, {entry['bytes']} were written)"
            elif _sha256(path) != entry["sha256"]:
                fault = "is altered (its checksum differs)"
            else:
                continue
            raise ValueError(f"{path} {fault}: delete it if it is there, then run the command again to compute it anew")

    def read(self, name: Feature, text: int) -> Tensor:
        """``[length, d]`` hidden states of a text."""
        shard, start, end = self._place[text]
        path = self._path(name, self._shards[shard])
        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt").get_slice(_TENSOR)  # type: ignore[no-untyped-call]
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{path} cannot be read ({error}): delete it if it is there and run the command again"
                ) from error
        states: Tensor = self._open[path][start:end]
        return states

    def num_bytes(self, names: Sequence[Feature], width: int, dtype: torch.dtype) -> int:
        """Bytes that what is missing will take, about."""
        tokens = sum(shard.num_tokens * len(self.missing(shard, names)) for shard in self._shards)
        return tokens * width * dtype.itemsize

    def _path(self, name: Feature, shard: Shard) -> Path:
        return self._folder / str(name) / f"{shard.index:05d}.safetensors"

    def _entry(self, name: Feature, shard: Shard) -> dict[str, Any] | None:
        """What the manifest says of a shard; None where it is not there or of other texts."""
        entry: dict[str, Any] | None = self._manifest(name)["shards"].get(str(shard.index))
        if entry is None or any(entry.get(key) != value for key, value in shard.describe().items()):
            return None
        return entry if self._path(name, shard).is_file() else None

    def _manifest(self, name: Feature) -> dict[str, Any]:
        if name not in self._manifests:
            path = self._folder / str(name) / "manifest.json"
            remedy = f"delete the folder {path.parent}, it is computed anew"
            manifest = {"format": FORMAT, "origin": self._origin, "shards": {}}
            if path.exists():
                manifest = read_json(path, remedy)
                if manifest.get("format") != FORMAT or not isinstance(manifest.get("shards"), dict):
                    raise ValueError(f"{path} is damaged or of another version: {remedy}")
                if manifest.get("origin") != self._origin:
                    raise ValueError(
                        f"{path} is of another target: {manifest.get('origin')}, not {self._origin}; give another "
                        "cache folder"
                    )
            self._manifests[name] = manifest
        return self._manifests[name]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""What loading a model will take of memory, from its configuration and its files' headers, before a weight is read.

A file is mapped, not read: tensors of the wanted dtype stay in it, others are converted while it is mapped beside them.
Then linear layers are laid out anew or quantized, each new weight beside the old ones.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from specdec.architecture import find_max_context
from specdec.drafters.weights import TargetFacts, fingerprint, fingerprint_rows, is_fingerprint_vector
from specdec.lean_stack import will_compile
from specdec.memory import size_text
from specdec.memory_plan import MemoryPlan, Workload, estimate, plan_memory
from specdec.model_shape import ModelShape
from specdec.precisions import BY_GROUPS_IN_8_BIT
from specdec.registry import unknown

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""As safetensors name them."""

_BITS = {"int8": 8, "w8a8": 8, "int4": 4, "int4-g128": 4, "w4a8": 4, "nf4": 4, "fp6": 6, "gguf": 8, "gguf-a8": 8}
_GROUP = 32
"""Inputs of a 4-bit weight that share a scale and a zero point; larger groups take less."""
_ROUNDING = 12
"""Bytes per number while a weight is quantized as a whole: itself, divided and rounded, in float32."""
_ROUNDED_BY_ROWS = ("int8", "w8a8")
"""A few rows at a time: beside the new weight there are its whole numbers, before they are laid out."""

SHORT = Workload(rows=1, prompt_len=32, max_len=64, nodes=1)
"""The smallest call that a model is loaded for."""


@dataclass(frozen=True)
class LoadPlan:
    """Bytes of a model while it is loaded, and afterwards.

    Attributes:
        shape: of the loaded model; its ``weights`` are what stays.
        max_context: most positions the model has, None where it sets no limit.
        loaded: weights as the files have them, in the wanted dtype.
        facts: what of the model drafters depend on; without a fingerprint where its files do not show it.
        mapped: files that are mapped beside that, because they hold another dtype; given back where memory is short.
        layouts: new layouts or quantized weights, beside the old ones until all are made.
        temporary: for the largest of them.
        in_panels: whether its weights, and those of drafters beside it, will be our own CPU kernels'.
        flat: whether passes over a few nodes will take little longer than over one.
    """

    shape: ModelShape
    max_context: int | None
    loaded: int
    facts: TargetFacts
    mapped: int = 0
    layouts: int = 0
    temporary: int = 0
    in_panels: bool = False
    flat: bool = True

    @property
    def held(self) -> int:
        """The most that cannot be given back."""
        return max(self.loaded + self.layouts + self.temporary, self.shape.weights)

    @property
    def peak(self) -> int:
        """The most that is resident."""
        return max(self.loaded + self.mapped, self.held)

    def describe(self) -> str:
        """One line."""
        return (
            f"weights {size_text(self.loaded)} as loaded, {size_text(self.layouts)} laid out anew, "
            f"{size_text(self.temporary)} for the largest of these: {size_text(self.held)} while loading, "
            f"{size_text(self.shape.weights)} afterwards"
        )


def read_headers(folder: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor in a folder's safetensors files, by name; no weight is read.

    Raises:
        ValueError: for a header that cannot be read, naming the file.
    """
    index = folder / "model.safetensors.index.json"
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    try:
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except FileNotFoundError:
        files = sorted(path.name for path in folder.glob("model*.safetensors"))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is damaged ({error}): fetch it again") from error
    for name in files:
        path = folder / name
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                if size > path.stat().st_size:
                    raise ValueError("its header is longer than the file")
                header = json.loads(file.read(size))
            for key, entry in header.items():
                if key != "__metadata__":
                    found[key] = (_DTYPES[entry["dtype"]], tuple(entry["shape"]))
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            raise ValueError(f"the header of {path} cannot be read ({error}): fetch it again") from error
    return found


def plan_load(
    folder: Path,
    dtype: torch.dtype | str = "auto",
    *,
    lays_out: bool = False,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    in_panels: bool = False,
) -> LoadPlan | None:
    """The plan of loading a folder; None where it has no safetensors files or is quantized already.

    Args:
        folder: what ``save_pretrained`` wrote.
        dtype: of the weights; the string "auto" is the checkpoint's own.
        lays_out: whether linear layers are laid out anew (see ``specdec.packing``).
        quantize: precision of the linear layers, see ``specdec.quantization``.
        trust_remote_code: run code that comes with the configuration.
        in_panels: whether the weights will be our own CPU kernels', so that layers run compiled where they are known.

    Raises:
        ValueError: for headers that cannot be read, or an unknown quantization.
    """
    if quantize is not None and quantize not in _BITS:
        raise ValueError(unknown("quantization", quantize, _BITS))
    if not folder.is_dir():
        return None
    headers = read_headers(folder)
    config = _read_config(folder, trust_remote_code)
    if not headers or config is None or getattr(config, "quantization_config", None) is not None:
        return None
    model_class = _class_of(config)
    compiled = in_panels and will_compile(model_class, config)
    config = config.get_text_config(decoder=True)
    facts = _read_facts(folder, model_class, config, headers)
    flat = quantize is None or (in_panels and quantize not in BY_GROUPS_IN_8_BIT)
    limit = find_max_context(config)
    wanted = dtype if isinstance(dtype, torch.dtype) else None
    loaded = mapped = 0
    element = 0
    for stored, shape in headers.values():
        count = math.prod(shape)
        becomes = wanted if wanted is not None and stored.is_floating_point else stored
        loaded += count * becomes.itemsize
        mapped += count * stored.itemsize if becomes != stored else 0
        element = max(element, becomes.itemsize if becomes.is_floating_point else 0)
    linears = _linears(headers, config)
    if not (lays_out or quantize) or not linears:
        as_it_is = ModelShape.from_config(config, loaded, element)
        return LoadPlan(as_it_is, limit, loaded, facts, mapped, in_panels=in_panels)
    old = element * sum(math.prod(shape) for shape in linears.values())
    layouts = sum(_laid_out(shape, element, quantize) for shape in linears.values())
    largest = max(math.prod(shape) for shape in linears.values())
    tied = _TIED in linears  # the head is another layout of the embeddings, which stay
    kept = loaded - old + (element * math.prod(linears[_TIED]) if tied else 0)
    if quantize is None:
        temporary = largest * element
    else:
        temporary = largest * (1 if quantize in _ROUNDED_BY_ROWS else _ROUNDING)
    laid_out = replace(ModelShape.from_config(config, kept + layouts, element), compiled=compiled)
    return LoadPlan(laid_out, limit, loaded, facts, mapped, layouts, temporary, in_panels, flat)


_TIED = "lm_head.weight, tied"


def _linears(headers: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the linear layers' weights: all matrices but the embeddings, and the head where it is theirs."""
    found: dict[str, tuple[int, ...]] = {
        name: shape for name, (_, shape) in headers.items() if len(shape) == 2 and not _embeds(name)
    }
    embeddings = [shape for name, (_, shape) in headers.items() if len(shape) == 2 and shape[0] == config.vocab_size]
    if "lm_head.weight" not in headers and embeddings:
        found[_TIED] = embeddings[0]
    return found


def _laid_out(shape: tuple[int, ...], element: int, quantize: str | None) -> int:
    """Bytes of a linear layer's new weight, scales included."""
    count = math.prod(shape)
    if quantize is None:
        return count * element
    scales = 8 * shape[0] if _BITS[quantize] > 4 else count // _GROUP * 2 * element
    return count * _BITS[quantize] // 8 + scales


def _read_config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        return None  # whoever loads the model says what is wrong with it


def _read_facts(
    folder: Path, model_class: str, config: Any, headers: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> TargetFacts:
    """What drafters go by; of the weights, the few that a target is known by are read."""
    size = int(config.vocab_size)
    facts = TargetFacts(model_class, int(config.hidden_size), size, int(config.num_hidden_layers), fingerprint="")
    tables = [name for name, (_, shape) in headers.items() if len(shape) == 2 and shape[0] == size and _embeds(name)]
    vectors = sorted(name for name, (_, shape) in headers.items() if is_fingerprint_vector(name, len(shape)))
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in {*vectors, *tables[:1]} & {*file.keys()}:
                part = file.get_slice(name)
                rows = [part[row : row + 1] for row in fingerprint_rows(size)] if name in tables else [part[:]]
                found[name] = torch.cat(rows)
    if not tables or len(found) <= len(vectors):
        return facts
    return replace(facts, fingerprint=fingerprint(found[tables[0]], (found[name] for name in vectors)))


def _embeds(name: str) -> bool:
    """Whether a matrix holds embeddings."""
    return "embed" in name or "wte" in name


def _class_of(config: Any) -> str:
    """The class that ``AutoModelForCausalLM`` makes a model of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    found: str = NAMES.get(config.model_type, "")
    return found


def check_load(load: LoadPlan, budget: int | None, drafter: int = 0, work: Workload | None = None) -> MemoryPlan:
    """What a call may have once this is loaded: the whole tree, else smaller ones, else fewer rows.

    Args:
        load: the plan of loading.
        budget: bytes in all; None is no limit.
        drafter: bytes of the drafter, as far as they are known.
        work: the call; a short text of one row, without drafts, where None.

    Raises:
        ValueError: where the weights do not fit while they are loaded, or not even one row without drafts afterwards,
            with the numbers.
    """
    work = work or SHORT
    if budget is not None and load.held + drafter > budget:
        raise ValueError(
            f"{size_text(load.held + drafter)} are needed to load the model and {size_text(budget)} may be used: "
            f"{load.describe()}, drafter {size_text(drafter)}. A call then takes "
            f"{estimate(load.shape, drafter, work, 1, 1).describe()}. Give more memory, or load it in "
            "fewer bits (dtype='bf16', quantize='int8')"
        )
    return plan_memory(load.shape, drafter, work, budget)

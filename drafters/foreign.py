"""Published checkpoints, read as this package's own weights: Medusa's, EAGLE-3's, and folders of speculators' format.

Tensors are renamed, nothing is converted: such heads bring output weights of their own and draft what their authors'
engines would. Sources: the checkpoints of FasterDecoding/Medusa and SafeAILab/EAGLE, and vllm-project/speculators'
models of type "eagle3".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specdec.drafters.layer import LayerShape
from specdec.drafters.weights import DrafterWeights, TargetFacts

_PICKLED = (".bin", ".pt", ".pth")


def read_foreign(folder: Path, target: TargetFacts, allow_pickle: bool = False) -> DrafterWeights | None:
    """Weights of a folder in one of the published layouts; None where its config.json is this package's own.

    Args:
        folder: the checkpoint.
        target: what it is to draft for; the layouts do not say.
        allow_pickle: read pickled tensors; objects in them are refused all the same, so nothing is run.

    Raises:
        ValueError: naming the file that is missing, damaged, of no known layout or for another target.
    """
    path = folder / "config.json"
    try:
        config: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # the reader of our own format says what is wrong
    if not isinstance(config, dict) or "drafter" in config:
        return None
    reader = _reader(config)
    if reader is None:
        raise ValueError(
            f"{path} is of no known layout: it is neither specdec's, nor Medusa's (medusa_num_heads), EAGLE-3's "
            "(draft_vocab_size) or speculators' eagle3 (speculators_model_type)"
        )
    tensors = _tensors(folder, allow_pickle)
    try:
        return reader(config, tensors, target)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder} lacks {error}, which its layout has") from error


_Reader = Callable[[Mapping[str, Any], Mapping[str, Tensor], TargetFacts], DrafterWeights]


def _reader(config: Mapping[str, Any]) -> _Reader | None:
    if "medusa_num_heads" in config:
        return _read_medusa
    if config.get("speculators_model_type") == "eagle3" or "draft_vocab_size" in config:
        return _read_eagle3
    return None


def _read_medusa(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetFacts) -> DrafterWeights:
    """Keys "head.layer.linear.weight" and ".bias", and "head.L.weight", the head's own output."""
    heads, layers = int(config["medusa_num_heads"]), int(config.get("medusa_num_layers", 1))
    tensors = {name.removeprefix("medusa_head."): tensor for name, tensor in tensors.items()}

    def stacked(name: str) -> Tensor:
        rows = [torch.stack([tensors[f"{head}.{i}.{name}"] for head in range(heads)]) for i in range(layers)]
        return torch.stack(rows).float()

    weight = stacked("linear.weight")
    outputs = torch.stack([tensors[f"{head}.{layers}.weight"] for head in range(heads)])
    _check("hidden size", weight.shape[-1], target.hidden_size)
    _check("vocabulary", outputs.shape[1], target.vocab_size)
    shape = {
        "hidden_size": weight.shape[-1], "num_heads": heads, "num_layers": layers, "own_output": outputs.shape[1],
    }  # fmt: skip
    state = {"weight": weight, "bias": stacked("linear.bias"), "output.weight": outputs.float()}
    return DrafterWeights("medusa", target, shape, state, facts={"source": "Medusa checkpoint"})


def _read_eagle3(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetFacts) -> DrafterWeights:
    """One layer, "midlayer" with SafeAILab and "layers.0" with speculators; ``d2t`` holds target id minus draft id."""
    layer = LayerShape.from_config(config.get("transformer_layer_config", config))
    _check("hidden size", int(config.get("target_hidden_size") or layer.hidden_size), target.hidden_size)
    _check("hidden size of its own layer", layer.hidden_size, target.hidden_size)
    if "t2d" in tensors:
        _check("vocabulary", len(tensors["t2d"]), target.vocab_size)
    prefix = "midlayer." if any(name.startswith("midlayer.") for name in tensors) else "layers.0."
    output = tensors["lm_head.weight"]
    size = output.shape[0]
    vocabulary = torch.arange(size) + tensors["d2t"] if "d2t" in tensors else torch.arange(size)
    if int(vocabulary.max()) >= target.vocab_size or int(vocabulary.min()) < 0:
        raise ValueError(f"its d2t names token {int(vocabulary.max())}, the target has {target.vocab_size} tokens")
    state = {
        "fc.weight": tensors["fc.weight"],
        "embedding_norm.weight": tensors[f"{prefix}input_layernorm.weight"],
        "hidden_norm.weight": tensors[f"{prefix}hidden_norm.weight"],
        "layer.post_attention_layernorm.weight": tensors[f"{prefix}post_attention_layernorm.weight"],
        "norm.weight": tensors["norm.weight"],
        "vocabulary": vocabulary,
        "output.weight": output,
    }
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        state[f"layer.{name}.weight"] = tensors[f"{prefix}self_attn.{name}.weight"]
    for name in ("gate_proj", "up_proj", "down_proj"):
        state[f"layer.{name}.weight"] = tensors[f"{prefix}mlp.{name}.weight"]
    if "fc.bias" in tensors:
        state["fc.bias"] = tensors["fc.bias"]
    states = config.get("eagle_aux_hidden_state_layer_ids") or (2, target.num_layers // 2, target.num_layers - 3)
    shape = {
        "layer": asdict(layer), "states": [int(state) for state in states[:3]], "vocab_size": size, "own_output": True,
        "scaled": False, "mixed": False, "fc_bias": "fc.bias" in tensors,
        "norm_before_residual": bool(config.get("norm_before_residual", False)),
    }  # fmt: skip
    return DrafterWeights("eagle", target, shape, state, facts={"source": "EAGLE-3 checkpoint"})


def _check(what: str, mine: int, wanted: int) -> None:
    if mine != wanted:
        raise ValueError(f"the checkpoint is for another target: {what} {mine}, not {wanted}")


def _tensors(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    found = sorted(folder.glob("*.safetensors"))
    if found:
        tensors: dict[str, Tensor] = {}
        for path in found:
            try:
                tensors.update(load_file(path))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} is damaged or truncated ({error}): fetch it again") from error
        return tensors
    pickled = sorted(path for path in folder.iterdir() if path.suffix in _PICKLED)
    if not pickled:
        raise ValueError(f"{folder} has no weights: there is neither a .safetensors nor a .pt or .bin file")
    if not allow_pickle:
        raise ValueError(
            f"{folder} has its weights only in a pickle ({pickled[0].name}): pass -o allow_pickle=true to read the "
            "tensors in it; objects are refused"
        )
    try:
        loaded: Any = torch.load(pickled[0], map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's errors share no base class
        raise ValueError(f"{pickled[0]} cannot be read: {error}") from error
    return {name: tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}

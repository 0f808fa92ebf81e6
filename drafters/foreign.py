"""Published checkpoints, read as this package's own weights: Medusa's, EAGLE's, and folders of speculators' format.

Tensors are renamed, nothing is converted: such heads draft what their authors' engines would. Sources: the checkpoints
of FasterDecoding/Medusa and SafeAILab/EAGLE, and vllm-project/speculators' models of type "eagle" and "eagle3". What a
variant adds to these layouts (norms elsewhere, more layers, embeddings of its own) is refused by the tensor's name
rather than left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from specdec.drafters.layer import ROPE_TYPES, LayerShape
from specdec.drafters.weights import DrafterWeights, TargetFacts

_PICKLED = (".bin", ".pt", ".pth")
_LLAMA = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "rms_norm_eps": 1e-6,
    "vocab_size": 32000,
}  # fmt: skip
"""What transformers' Llama configurations leave out where it is the default."""
_FROM_TARGET = ("embed_tokens.weight", "rotary_emb.inv_freq", "verifier_norm.weight", "verifier_lm_head.weight")
"""Tensors copied from the target, or computed; read from it instead."""


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
            f"{path} is of no known layout: it is neither specdec's, nor Medusa's (medusa_num_heads), EAGLE's (one "
            "layer of Llama's), EAGLE-3's (draft_vocab_size) or speculators' (speculators_model_type eagle or eagle3)"
        )
    tensors = _tensors(folder, allow_pickle)
    try:
        return reader(config, tensors, target)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder} lacks {error}, which its layout has") from error
    except ValueError as error:
        raise ValueError(f"{folder} cannot be used: {error}") from error


_Reader = Callable[[Mapping[str, Any], Mapping[str, Tensor], TargetFacts], DrafterWeights]


def _reader(config: Mapping[str, Any]) -> _Reader | None:
    if "speculators_model_type" in config:
        return {"eagle": _read_eagle, "eagle3": _read_eagle3}.get(config["speculators_model_type"])
    if "medusa_num_heads" in config:
        return _read_medusa
    if "draft_vocab_size" in config:
        return _read_eagle3
    # EAGLE's first checkpoints have a Llama's configuration and nothing beside.
    return _read_eagle if config.get("num_hidden_layers") == 1 and "num_attention_heads" in config else None


def _read_medusa(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetFacts) -> DrafterWeights:
    """Keys "head.layer.linear.weight" and ".bias", and "head.L.weight", the head's own output."""
    heads, layers = int(config["medusa_num_heads"]), int(config.get("medusa_num_layers", 1))
    tensors = {name.removeprefix("medusa_head."): tensor for name, tensor in tensors.items()}
    while f"{heads}.0.linear.weight" in tensors:  # the published files hold more heads than their configurations say
        heads += 1

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


def _read_eagle(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetFacts) -> DrafterWeights:
    """The first form: one layer "layers.0" without a norm before it, "fc" from embedding and state; with speculators
    they are "transformer" and "fusion_fc"."""
    published = "speculators_model_type" in config
    prefix, fc = ("transformer.", "fusion_fc.") if published else ("layers.0.", "fc.")
    names = _layer_names(prefix, tensors) | {f"{fc}weight": "fc.weight"}
    has_bias = f"{fc}bias" in tensors
    if has_bias:
        names[f"{fc}bias"] = "fc.bias"
    layer = _layer_shape(config, tensors, prefix, target)
    _check("vocabulary", int(_layer_config(config)["vocab_size"]), target.vocab_size)
    state = _renamed(tensors, names, ("lm_head.weight",))  # where there is one, it is the target's
    shape = {"layer": asdict(layer), "fc_bias": has_bias}
    return DrafterWeights("eagle", target, shape, state, facts={"source": "EAGLE checkpoint"})


def _read_eagle3(config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: TargetFacts) -> DrafterWeights:
    """One layer, "midlayer" with SafeAILab and "layers.0" with speculators; ``d2t`` holds target id minus draft id."""
    if config.get("embed_requires_grad"):
        raise ValueError("it has embeddings of its own (embed_requires_grad), which are not supported")
    prefix = "midlayer." if any(name.startswith("midlayer.") for name in tensors) else "layers.0."
    layer = _layer_shape(config, tensors, prefix, target)
    _check("hidden size", int(config.get("target_hidden_size") or layer.hidden_size), target.hidden_size)
    if "t2d" in tensors:
        _check("vocabulary", len(tensors["t2d"]), target.vocab_size)
    names = _layer_names(prefix, tensors) | {
        "fc.weight": "fc.weight", "norm.weight": "norm.weight", "lm_head.weight": "output.weight",
        f"{prefix}input_layernorm.weight": "embedding_norm.weight",
        f"{prefix}hidden_norm.weight": "hidden_norm.weight",
    }  # fmt: skip
    has_bias = "fc.bias" in tensors
    if has_bias:
        names["fc.bias"] = "fc.bias"
    state = _renamed(tensors, names, ("d2t", "t2d"))
    size = len(state["output.weight"])
    vocabulary = torch.arange(size) + tensors["d2t"] if "d2t" in tensors else torch.arange(size)
    if int(vocabulary.max()) >= target.vocab_size or int(vocabulary.min()) < 0:
        raise ValueError(f"its d2t names token {int(vocabulary.max())}, the target has {target.vocab_size} tokens")
    shape = {
        "layer": asdict(layer),
        "states": _state_layers(config, target)[: state["fc.weight"].shape[1] // layer.hidden_size],
        "vocab_size": size, "own_output": True, "scaled": False, "mixed": False, "fc_bias": has_bias,
        "norm_before_residual": bool(config.get("norm_before_residual", False)),
    }  # fmt: skip
    return DrafterWeights(
        "eagle", target, shape, {**state, "vocabulary": vocabulary}, facts={"source": "EAGLE-3 checkpoint"}
    )


def _state_layers(config: Mapping[str, Any], target: TargetFacts) -> list[int]:
    """After how many layers the target's states are read.

    Configurations count in two ways: layers passed, as SafeAILab's code does and vLLM, and the index of the last one
    passed, as SGLang once did. Both take the state after two layers first, so a list that begins with 1 is of the
    second kind (sglang pull request 25454).
    """
    nested = config.get("eagle_config") or {}
    given = config.get("eagle_aux_hidden_state_layer_ids") or nested.get("eagle_aux_hidden_state_layer_ids")
    layers = [int(layer) for layer in given or (2, target.num_layers // 2, target.num_layers - 3)]
    return [layer + 1 for layer in layers] if layers[0] == 1 else layers


def _layer_names(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The decoder layer's tensors, published name to ours."""
    inner = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    inner += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    inner += [f"self_attn.{name}_proj.bias" for name in "qkv" if _has_bias(prefix, tensors)]
    names = {prefix + name: f"layer.{name.split('.', 1)[1]}" for name in inner}
    return names | {f"{prefix}post_attention_layernorm.weight": "layer.post_attention_layernorm.weight"}


def _has_bias(prefix: str, tensors: Mapping[str, Tensor]) -> bool:
    return f"{prefix}self_attn.q_proj.bias" in tensors


def _layer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The layer's own part of a configuration."""
    return {**_LLAMA, **config.get("transformer_layer_config", config)}


def _layer_shape(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], prefix: str, target: TargetFacts
) -> LayerShape:
    config = _layer_config(config)
    layer = LayerShape.from_config(config)
    _check("hidden size", layer.hidden_size, target.hidden_size)
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = scaling["rope_type"] = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind in ("default", "mrope"):  # of a text's tokens the latter makes what the former does
        scaling = {}
    elif kind not in ROPE_TYPES:
        raise ValueError(f"its rope_type {kind!r} is not supported; {', '.join(ROPE_TYPES)} are")
    return replace(layer, qkv_bias=_has_bias(prefix, tensors), rope_scaling=scaling or None)


def _renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str], beside: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors under our names; those ``beside`` them are known and not wanted."""
    for name in tensors:
        if name not in names and name not in beside and not name.endswith(_FROM_TARGET):
            raise ValueError(f"its tensor {name!r} is of a variant that is not supported")
    return {ours: tensors[theirs] for theirs, ours in names.items()}


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

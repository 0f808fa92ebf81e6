"""Trained weights as checkpoints that vLLM loads by itself, without this package.

Layouts: Medusa's as vLLM's ``MedusaModel`` reads it (FasterDecoding/Medusa's tensor names, and the shared output head
that vLLM added); EAGLE-3's as SafeAILab/EAGLE publishes it; and the folder of vllm-project/speculators' models of type
"eagle3". Nothing is approximated: a head that a layout cannot express is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specdec.drafters.weights import DrafterWeights
from specdec.files import whole_file, write_atomically
from specdec.registry import unknown
from specdec.target import HFTarget

Checkpoint = tuple[dict[str, Any], dict[str, Tensor]]
"""config.json, and the tensors."""


def export_weights(
    weights: DrafterWeights, target: HFTarget, target_name: str, layout: str, folder: Path, num_tokens: int = 4
) -> None:
    """Write a checkpoint; every file is there whole or not at all, config.json last.

    Args:
        weights: trained, or read from a published checkpoint.
        target: what they draft for; its output head's rows are copied where the drafter has none of its own.
        target_name: what vLLM is to load it by; speculators' layout names it.
        layout: one of ``LAYOUTS``.
        folder: made where it is missing.
        num_tokens: tokens drafted per step, which speculators' layout names.

    Raises:
        ValueError: where the layout is unknown, or cannot express these weights.
    """
    if layout not in LAYOUTS:
        raise ValueError(unknown("format", layout, LAYOUTS))
    if num_tokens < 1:
        raise ValueError(f"at least 1 token is drafted per step, got {num_tokens}")
    config, tensors = LAYOUTS[layout](weights, target, target_name, num_tokens)
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with whole_file(folder / "model.safetensors") as temporary:
        save_file(stored, temporary, metadata={"format": "pt"})
    write_atomically(folder / "config.json", json.dumps(config, indent=1, ensure_ascii=False) + "\n")


def _medusa(weights: DrafterWeights, target: HFTarget, _name: str, _tokens: int) -> Checkpoint:
    """Heads of residual blocks; one output head for all of them where they share the target's.

    It is the whole one: for a reduced vocabulary vLLM has a ``token_map``, which it then misses among the weights it
    has loaded and refuses the checkpoint.
    """
    _check_drafter(weights, "medusa", "medusa")
    shape, state = weights.shape, weights.tensors
    if shape.get("mixed"):
        raise ValueError(
            "these heads have a linear map of their own (mixed), where Medusa's layout has the identity: train them "
            "with -o mixed=false"
        )
    weight, bias = state["weight"].float(), state["bias"].float()  # [L, K, d, d], [L, K, d]
    layers, heads, width = bias.shape
    tensors = {}
    for head in range(heads):
        for layer in range(layers):
            tensors[f"{head}.{layer}.linear.weight"] = weight[layer, head]
            tensors[f"{head}.{layer}.linear.bias"] = bias[layer, head]
    if "output.weight" in state:
        for head in range(heads):
            tensors[f"{head}.{layers}.weight"] = state["output.weight"][head].float()
    else:
        tensors[f"0.{layers}.weight"] = _output_rows(target, None)
    config = {
        "model_type": "medusa",
        "architectures": ["MedusaModel"],
        "hidden_size": width,
        "vocab_size": target.vocab_size,
        "medusa_num_heads": heads,
        "medusa_num_layers": layers,
        "medusa_fc_bias": True,
        "original_lm_head": "output.weight" not in state,
    }
    return config, tensors


def _eagle3(weights: DrafterWeights, target: HFTarget, _name: str, _tokens: int) -> Checkpoint:
    """SafeAILab's: the layer is called "midlayer"."""
    tensors, layer, head = _eagle_parts(weights, target, "midlayer.")
    layers = head.pop("eagle_aux_hidden_state_layer_ids")
    eagle = {"eagle_aux_hidden_state_layer_ids": layers, "use_aux_hidden_state": True}
    return {**layer, "architectures": ["LlamaForCausalLMEagle3"], **head, "eagle_config": eagle}, tensors


def _speculators(weights: DrafterWeights, target: HFTarget, name: str, num_tokens: int) -> Checkpoint:
    tensors, layer, head = _eagle_parts(weights, target, "layers.0.")
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": num_tokens}],
            "verifier": {"name_or_path": name, "architectures": [type(target.model).__name__]},
        },
        "transformer_layer_config": {**layer, "architectures": ["LlamaForCausalLM"]},
        **head,
    }
    return config, tensors


def _eagle_parts(
    weights: DrafterWeights, target: HFTarget, prefix: str
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """Tensors, the layer's configuration, and what is said of the head."""
    _check_drafter(weights, "eagle", "eagle3")
    shape, state = weights.shape, weights.tensors
    if "states" not in shape:
        raise ValueError("these weights are of EAGLE's first form, not EAGLE-3's, whose layout this is")
    layer = shape["layer"]
    for name, default, why in (
        ("scaled", True, "brings the target's states to unit length"),
        ("mixed", True, "adds its layer to a mix of embedding and state"),
        ("fc_bias", False, "has a bias in its fusion"),
    ):
        if shape.get(name, default):
            raise ValueError(f"this head {why} ({name}), which EAGLE-3's layout cannot say")
    if layer.get("qkv_bias"):
        raise ValueError("this head has biases in its attention (qkv_bias), which EAGLE-3's layout cannot say")
    vocabulary = state.get("vocabulary")
    tensors = {
        "fc.weight": state["fc.weight"],
        "norm.weight": state["norm.weight"],
        f"{prefix}input_layernorm.weight": state["embedding_norm.weight"],
        f"{prefix}hidden_norm.weight": state["hidden_norm.weight"],
        f"{prefix}post_attention_layernorm.weight": state["layer.post_attention_layernorm.weight"],
        "lm_head.weight": state["output.weight"] if "output.weight" in state else _output_rows(target, vocabulary),
    }
    for name in "qkvo":
        tensors[f"{prefix}self_attn.{name}_proj.weight"] = state[f"layer.{name}_proj.weight"]
    for name in ("gate", "up", "down"):
        tensors[f"{prefix}mlp.{name}_proj.weight"] = state[f"layer.{name}_proj.weight"]
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if vocabulary is not None:
        ids = vocabulary.to(torch.int64)
        tensors["d2t"] = ids - torch.arange(len(ids), device=ids.device)
        tensors["t2d"] = torch.zeros(target.vocab_size, dtype=torch.bool).index_fill(0, ids.cpu(), True)
    rope = {"rope_type": "default", **(layer.get("rope_scaling") or {}), "rope_theta": layer["rope_theta"]}
    config = {
        "model_type": "llama",
        "hidden_size": layer["hidden_size"],
        "intermediate_size": layer["intermediate_size"],
        "num_attention_heads": layer["num_heads"],
        "num_key_value_heads": layer["num_kv_heads"],
        "head_dim": layer["head_dim"],
        "num_hidden_layers": 1,
        "rms_norm_eps": layer["norm_eps"],
        "rope_theta": layer["rope_theta"],
        "rope_parameters": rope,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "vocab_size": target.vocab_size,
        "max_position_embeddings": int(getattr(target.config, "max_position_embeddings", 2048)),
    }
    head = {
        "draft_vocab_size": len(tensors["lm_head.weight"]),
        "norm_before_residual": bool(shape.get("norm_before_residual", False)),
        "eagle_aux_hidden_state_layer_ids": [_layers_passed(name, target) for name in shape["states"]],
    }
    return tensors, config, head


def _layers_passed(feature: Any, target: HFTarget) -> int:
    return target.num_layers if feature == "pre_norm" else int(feature)


def _output_rows(target: HFTarget, vocabulary: Tensor | None) -> Tensor:
    """The target's output head ``[V', d]``, in float32."""
    head = target.model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ValueError(
            f"the output head of {type(target.model).__name__} has a bias, for which no layout has a place"
        )
    rows: Tensor = head.weight.detach() if vocabulary is None else head.weight.detach()[vocabulary]
    return rows.float()


def _check_drafter(weights: DrafterWeights, wanted: str, layout: str) -> None:
    if weights.drafter != wanted:
        raise ValueError(f"the format {layout} is for weights of drafter {wanted!r}, these are of {weights.drafter!r}")


LAYOUTS: Mapping[str, Callable[[DrafterWeights, HFTarget, str, int], Checkpoint]] = {
    "medusa": _medusa,
    "eagle3": _eagle3,
    "speculators": _speculators,
}
"""Formats of ``specdec export vllm``."""

"""A tiny random Llama and drafters for it, written to folders.

Heads of 32: vLLM's attention on the CPU has no smaller ones. The drafters start from what their classes start from, so
they foresee that the last token comes again, which a random model's text does often enough to be accepted; noise of
its own keeps every weight in play.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.drafters.clover import make_clover
from specdec.drafters.eagle import make_eagle
from specdec.drafters.layer import LayerShape
from specdec.drafters.medusa import MedusaHeads
from specdec.drafters.weights import DrafterWeights, TargetFacts, save_weights
from specdec.target import HFTarget

VOCAB, WIDTH, HEADS = 509, 128, 4
"""A prime vocabulary: vLLM pads its tables, and what it pads must not be drafted."""


def make_model(folder: Path) -> HFTarget:
    """The target, saved to ``folder``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.06,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return HFTarget(model)


def make_drafter(target: HFTarget, name: str, folder: Path, vocab_size: int = 0) -> DrafterWeights:
    """Weights of medusa, clover or eagle, saved to ``folder``; "eagle3" are of the published form."""
    torch.manual_seed(1)
    layer = asdict(LayerShape.of(target))
    shape: dict[str, Any]
    module: Any
    if name == "medusa":
        shape = {"hidden_size": WIDTH, "num_heads": HEADS, "num_layers": 1, "vocab_size": vocab_size}
        module = MedusaHeads(**shape)
    elif name == "clover":
        shape = {"layer": layer, "num_layers": 1, "num_drafts": HEADS, "vocab_size": vocab_size}
        module = make_clover(shape)
    else:
        shape = {"layer": layer, "states": [2, 3, "pre_norm"], "vocab_size": vocab_size}
        if name == "eagle3":
            shape |= {"scaled": False, "mixed": False, "own_output": True, "vocab_size": vocab_size or VOCAB}
        module = make_eagle(shape)
    for parameter in module.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    if name.startswith("eagle"):
        module.fc.weight.data[:, -WIDTH:] += torch.eye(WIDTH)
        if module.mix is not None:
            module.mix.weight.data[:, -WIDTH:] += torch.eye(WIDTH)
    if module.vocabulary is not None:
        chosen = torch.randperm(VOCAB)[: shape["vocab_size"]].sort().values
        module.vocabulary.copy_(chosen)
    if name == "eagle3":
        rows = target.model.get_output_embeddings().weight[module.vocabulary]
        module.output.weight.data.copy_(rows)
    weights = DrafterWeights("eagle" if name == "eagle3" else name, TargetFacts.of(target), shape, module.state_dict())
    save_weights(folder, weights, card="")
    return weights

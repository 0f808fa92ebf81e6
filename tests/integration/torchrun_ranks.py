"""A program for ``torchrun``: layer-parallel drafting whose attentions the processes share out.

Every process writes what it decoded to FOLDER/RANK.json, so that one can be compared with the others.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from integration.architectures import tiny_model
from specdec import SpecDecoder
from specdec.drafters.layer_parallel import LayerParallelConfig, LayerParallelDrafter

PROMPTS = [[5, 6, 7, 8, 9], [30, 31]]
SETTINGS: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}]


def decode(attention: Any) -> dict[str, Any]:
    """Tokens and counts of greedy and of drawn texts, drafted for in groups of four layers."""
    drafter = LayerParallelDrafter(
        LayerParallelConfig(group=4, attention=attention), tiny_model(seed=1, num_hidden_layers=6)
    )
    decoder = SpecDecoder(tiny_model(), drafter, adaptive=False, on_drafter_error="raise")
    found: dict[str, Any] = {"tokens": [], "accepted": []}
    for fields in SETTINGS:
        results = decoder.generate(PROMPTS, max_new_tokens=10, ignore_eos=True, **fields)
        found["tokens"].append([result.token_ids for result in results])
        found["accepted"].append([decoder.stats.drafted, decoder.stats.accepted])
    return found


def main(folder: Path) -> None:
    """One of the processes; nothing but what ``torchrun`` sets says which."""
    torch.set_num_threads(1)
    found = decode("auto")  # which starts the group
    assert distributed.get_world_size() == int(os.environ["WORLD_SIZE"])
    drafter = LayerParallelDrafter(model=tiny_model(seed=1, num_hidden_layers=6))
    with pytest.raises(ValueError, match=r"drafter 'layer_parallel' shares its work .* pass adaptive=False"):
        SpecDecoder(tiny_model(), drafter)  # the second one joins the group that is there
    (folder / f"{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

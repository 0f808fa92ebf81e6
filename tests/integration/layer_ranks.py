"""Processes that share out a draft model's attentions, against one process. Prints the numbers of ranks that agree.

A program of its own: processes are forked before any thread pool exists, so that the libraries load only once.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from unit_rows import make_batch

from integration.architectures import tiny_model
from specdec import SpecDecoder
from specdec.drafters.layer_parallel import LayerParallelConfig, LayerParallelDrafter, _check_agreement

PROMPTS = [[5, 6, 7, 8, 9], [30, 31]]


def generate(attention: Any) -> dict[str, Any]:
    """Logits of every pass of the draft model, and the text."""
    drafter = LayerParallelDrafter(
        LayerParallelConfig(group=4, attention=attention), tiny_model(seed=1, num_hidden_layers=6)
    )
    logits: list[torch.Tensor] = []
    forward = drafter.draft_model.forward

    def kept(*inputs: Any, **named: Any) -> Any:
        output = forward(*inputs, **named)
        logits.append(output.logits.clone())
        return output

    drafter.draft_model.forward = kept  # type: ignore[method-assign]
    decoder = SpecDecoder(tiny_model(), drafter, adaptive=False, on_drafter_error="raise")
    results = decoder.generate(PROMPTS, max_new_tokens=12, ignore_eos=True)
    return {"tokens": [result.token_ids for result in results], "logits": logits}


def work(rank: int, world: int, folder: str) -> None:
    """One of ``world`` processes."""
    os.environ["WORLD_SIZE"] = str(world)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/{world}", rank=rank, world_size=world)
    torch.save(generate("auto"), f"{folder}/{world}-{rank}.pt")
    with pytest.raises(RuntimeError, match="the processes draft for different states"):
        _check_agreement(make_batch([[3, 2, rank + 1]], 50))  # would mix up their results
    distributed.barrier()
    distributed.destroy_process_group()


def main() -> None:
    torch.set_num_threads(1)
    forked = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        for world in (2, 4):
            processes = [forked.Process(target=work, args=(rank, world, folder)) for rank in range(world)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(60)
                if process.exitcode != 0:
                    raise SystemExit(f"a process of {world} ended with {process.exitcode}")
        alone = generate("separate")
        assert len(alone["logits"]) > 4
        for world in (2, 4):
            for rank in range(world):
                shared = torch.load(Path(folder) / f"{world}-{rank}.pt", weights_only=True)
                assert shared["tokens"] == alone["tokens"], (world, rank)
                assert len(shared["logits"]) == len(alone["logits"])
                assert all(map(torch.equal, shared["logits"], alone["logits"])), (world, rank)
            print(world)


if __name__ == "__main__":
    main()

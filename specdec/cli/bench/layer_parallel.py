"""``specdec bench layer-parallel``: what drafting with groups of layers costs in accuracy and saves in time."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from specdec.cli.bench.outputs import check_outputs
from specdec.cli.console import note, slow_status

QUESTIONS = 8


@click.command("layer-parallel")
@click.option("-m", "--model", default="smollm2", show_default=True, help="Alias, folder or hub id of the target.")
@click.option("--draft-model", default="", help="Alias, folder or hub id of the draft model; else what ships for -m.")
@click.option("--group", type=click.IntRange(min=1), default=4, show_default=True, help="Layers of a group.")
@click.option("--depth", type=click.IntRange(min=1), default=5, show_default=True, help="Passes of a draft.")
@click.option("--beams", type=click.IntRange(min=1), default=1, show_default=True, help="1 drafts a chain.")
@click.option("-t", "--max-new-tokens", type=click.IntRange(min=4), default=96, show_default=True, help="Of a reply.")
@click.option("--limit", type=click.IntRange(min=1), default=QUESTIONS, show_default=True, help="Questions.")
@click.option("--dtype", default="auto", show_default=True, help="Weights' type: auto, fp32, bf16, fp16.")
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, ...")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; PyTorch's choice by default.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result there.")
def layer_parallel(
    model: str,
    draft_model: str,
    group: int,
    depth: int,
    beams: int,
    max_new_tokens: int,
    limit: int,
    dtype: str,
    device: str,
    threads: int | None,
    json_path: Path | None,
) -> None:
    """Compare a draft model that runs its layers in groups with the same one that does not.

    Both draft in turn at the same places of replies that the target wrote greedily to the shipped questions. Accuracy
    is the share of drafted levels whose token was the reply's own.
    """
    import torch

    from specdec.benchmarks.drafts import Start, compare_drafts, document
    from specdec.benchmarks.questions import SHIPPED, load_questions
    from specdec.benchmarks.record import write_json
    from specdec.decoder import SpecDecoder
    from specdec.drafters.layer_parallel import LayerParallelConfig, LayerParallelDrafter
    from specdec.drafters.model import ModelConfig, ModelDrafter
    from specdec.models import find_device
    from specdec.prompts import Prompt, encode_prompt

    check_outputs(json_path)
    if threads is not None:
        torch.set_num_threads(threads)
    start = Start.now(find_device(device))
    with slow_status(f"loading {model}") as say:
        exact = ModelConfig(model=draft_model, dtype=dtype, device=device, depth=depth, beams=beams)
        drafters = ModelDrafter(exact), LayerParallelDrafter(LayerParallelConfig(**vars(exact), group=group))
        decoder = SpecDecoder(model, "none", dtype=dtype, device=device)
        for drafter in drafters:
            drafter.bind(decoder.target, decoder.tokenizer)
        say("writing replies")
        questions = load_questions(SHIPPED).limit(limit)
        chats: list[Prompt] = [[{"role": "user", "content": question.turns[0]}] for question in questions.questions]
        prompts = [encode_prompt(chat, decoder.tokenizer, decoder.target.vocab_size) for chat in chats]
        replies = [decoder.generate(prompt, max_new_tokens=max_new_tokens, temperature=0.0) for prompt in prompts]
        say("drafting")
        texts = [[*prompt, *reply.token_ids] for prompt, reply in zip(prompts, replies, strict=True)]
        found = compare_drafts(drafters, decoder.target, texts, list(map(len, prompts)))
    click.echo(f"{found.drafts} drafts of {depth} levels, groups of {group}")
    for name, rate, ms in zip(("exact", "in groups"), found.accuracy, found.milliseconds, strict=True):
        click.echo(f"{name:<10} accuracy {rate:.3f}   {ms:.2f} ms a draft")
    click.echo(f"in groups  {100 * found.accuracy_lost:.1f} % less accurate, drafts {found.speedup:.2f}x as fast")
    if json_path is not None:
        settings = {
            "model": model, "draft_model": draft_model or "the draft model that ships",
            "dtype": str(decoder.target.dtype).removeprefix("torch."),
            "group": group, "depth": depth, "beams": beams, "max_new_tokens": max_new_tokens,
        }  # fmt: skip
        write_json(json_path, document(found, settings, questions, ["specdec", *sys.argv[1:]], start))
        note(f"wrote {json_path}")

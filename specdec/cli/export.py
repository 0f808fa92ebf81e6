"""``specdec export``: trained drafters as other engines' checkpoints."""

from __future__ import annotations

from pathlib import Path

import click

from specdec.cli import LazyGroup

TARGETS = {"vllm": "specdec.cli.export:vllm"}


@click.group(cls=LazyGroup, sources=TARGETS)
def export() -> None:
    """Write trained drafters as checkpoints of other engines."""


@click.command()
@click.option("--format", "layout", required=True, help="medusa, eagle3 or speculators.")
@click.option("-m", "--model", default="smollm2", show_default=True, help="Alias, folder or hub id of the target.")
@click.option("--weights", type=click.Path(path_type=Path, file_okay=False), help="Their folder; else those shipped.")
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False), help="Folder to write.")
@click.option("-k", "--num-tokens", type=click.IntRange(min=1), default=4, show_default=True, help="Drafted per step.")
@click.option("--allow-pickle", is_flag=True, help="Read pickled weights; objects in them are refused all the same.")
def vllm(layout: str, model: str, weights: Path | None, out: Path, num_tokens: int, allow_pickle: bool) -> None:
    """Write medusa or eagle weights so that vLLM loads them by itself, without specdec.

    The speculative_config to give vLLM is printed. Weights may be those that `specdec train` wrote, or a published
    checkpoint that is to change its format.
    """
    import json

    from specdec.cli.train import load_target
    from specdec.drafters.foreign import read_foreign
    from specdec.drafters.weights import TargetFacts, find_pretrained, load_weights
    from specdec.integrations.vllm.export import LAYOUTS, export_weights
    from specdec.model_files import model_location
    from specdec.registry import unknown

    if layout not in LAYOUTS:
        raise ValueError(unknown("format", layout, LAYOUTS))
    if weights is not None and not weights.is_dir():
        raise ValueError(f"there is no folder {str(weights)!r} of weights")
    target, _ = load_target(model, "fp32", "cpu")
    facts = TargetFacts.of(target)
    drafter = "medusa" if layout == "medusa" else "eagle"
    folder = weights or find_pretrained(drafter, facts)
    if folder is None:
        raise ValueError(f"no weights of drafter {drafter!r} ship for {model}: give their folder with --weights")
    found = read_foreign(folder, facts, allow_pickle) or load_weights(folder)
    differing = found.target.difference(facts)
    if differing:
        raise ValueError(f"the weights of {folder} are for another target: {differing}")
    export_weights(found, target, model_location(model), layout, out, num_tokens)
    method = "medusa" if layout == "medusa" else "eagle3"
    config = {"method": method, "model": str(out), "num_speculative_tokens": num_tokens}
    click.echo(f"speculative_config = {json.dumps(config)}")

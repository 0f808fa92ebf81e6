"""``specdec vllm-config``: how vLLM is told of a drafter."""

from __future__ import annotations

import json

import click

from specdec.cli.options import split_assignments


@click.command("vllm-config")
@click.option("-m", "--model", default="smollm2", show_default=True, help="Alias, folder or hub id of the target.")
@click.option("-d", "--drafter", default="auto", show_default=True, help="Drafter; `specdec list` shows them.")
@click.option("-o", "options", multiple=True, metavar="NAME=VALUE", help="Drafter option; repeatable.")
@click.option("-k", "--num-tokens", type=click.IntRange(min=1), default=5, show_default=True, help="Drafted per step.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def vllm_config(model: str, drafter: str, options: tuple[str, ...], num_tokens: int, as_json: bool) -> None:
    """Print vLLM's speculative_config and additional_config for a drafter, and the `vllm serve` line."""
    from specdec.integrations.vllm.launch import Launch
    from specdec.integrations.vllm.settings import Settings
    from specdec.model_files import model_location

    settings = Settings(drafter, split_assignments(options))
    launch = Launch(model_location(model), settings, num_tokens)
    document = launch.to_json()
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    click.echo(f"speculative_config = {json.dumps(document['speculative_config'])}")
    click.echo(f"additional_config = {json.dumps(document['additional_config'])}")
    click.echo(f"\n{document['command']}")

"""``specdec plan``: what a call will take of memory, before the model is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from specdec.cli.console import slow_status
from specdec.cli.options import kv_option, quantize_option, split_assignments


@click.command()
@click.option("-m", "--model", default="smollm2", show_default=True, help="Alias, folder or hub id of the target.")
@click.option("-d", "--drafter", default="auto", show_default=True, help="Drafter, by name.")
@click.option("-o", "drafter_options", multiple=True, metavar="NAME=VALUE", help="Drafter option; repeatable.")
@click.option("--rows", type=click.IntRange(min=1), default=1, show_default=True, help="Completions of the call.")
@click.option("--length", type=click.IntRange(min=1), default=512, show_default=True, help="Tokens of each prompt.")
@click.option("-t", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Of each row.")
@click.option("--sampled", is_flag=True, help="Tokens are drawn, not the most probable.")
@click.option("--memory-budget", metavar="SIZE", help="Most memory, weights included: 2GiB; else what is free.")
@click.option("--dtype", default="auto", show_default=True, help="Weights' type: auto, fp32, bf16, fp16.")
@click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, ...")
@quantize_option
@kv_option
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the configuration.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else on stdout.")
def plan(
    model: str, drafter: str, drafter_options: tuple[str, ...], rows: int, length: int, max_new_tokens: int,
    sampled: bool, memory_budget: str | None, dtype: str, device: str, quantize: str | None, kv: str | None,
    trust_remote_code: bool, as_json: bool,
) -> None:  # fmt: skip
    """Say what loading MODEL and then a call take of memory, and what of the call fits; weights are not read.

    Trees shrink first, then rows are decoded fewer at a time; a model or a call that does not fit at all exits with 2
    and the numbers. A hub's files are fetched as for loading.
    """
    with slow_status(f"planning {model}") as say:
        from specdec.call_memory import plan_before_load
        from specdec.drafter_plan import plan_drafter, resolve_planned
        from specdec.kv_quantized import find_kv
        from specdec.memory import free_bytes, parse_size, size_text
        from specdec.memory_plan import tree_size
        from specdec.models import find_device, plan_model
        from specdec.registry import create_drafter

        options = split_assignments(drafter_options)
        asked = drafter if drafter == "auto" else create_drafter(drafter, options)  # a mistake shows at once
        budget = free_bytes(find_device(device)) if memory_budget is None else parse_size(memory_budget)
        kv_bits = find_kv(kv)
        load = plan_model(
            model, dtype=dtype, device=device, packed=True, quantize=quantize, trust_remote_code=trust_remote_code,
            progress=say,
        )  # fmt: skip
        if load is None:
            raise ValueError(
                f"{model!r} has no headers to plan by: it is a .gguf file, pickled, quantized already or a draft model "
                "made to order. Load it with --memory-budget: each call is planned then"
            )
        made = resolve_planned(asked, load, options)
        found = plan_before_load(
            load, made, budget, rows=rows, prompt_len=length, new_tokens=max_new_tokens, sampled=sampled,
            kv_bits=kv_bits,
        )  # fmt: skip
    if as_json:
        loading = asdict(load) | {"held": load.held, "peak": load.peak}
        click.echo(json.dumps({"model": model, "budget": budget, "load": loading, "call": found.to_json()}))
        return
    click.echo(f"to load: {load.describe()}")
    click.echo(f"to decode: {found.describe()}")
    whole = (found.rows, found.nodes) == (rows, tree_size(made))
    fits = "all of it fits" if whole else f"{rows} rows of {tree_size(made)} nodes do not fit at a time, this does"
    lacking = plan_drafter(made, load).unknown
    but = f", but for the weights of {' and '.join(lacking)}, which are not there" if lacking else ""
    click.echo(f"{size_text(budget)} may be used with drafter {made.name}: {fits}{but}")

"""``specdec bench peers``: specdec beside the engines that users would pick instead, on the same weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specdec.cli.bench.outputs import check_outputs, resumable
from specdec.precisions import SCHEME_NAMES, STORED_NAMES

if TYPE_CHECKING:
    from specdec.models import LoadedModel

MAX_CONTEXT = 4096
"""Tokens of prompt and answer that engines get room for, unless the questions need more or the model has fewer."""
DRAFT_ROOM = 64
"""Tokens that may be drafted beyond the end of an answer."""
CACHE_DIR = "~/.cache/specdec/peers"
QUANTIZED = (*SCHEME_NAMES, *STORED_NAMES)
"""Precisions of ours that are no dtype."""


@click.command("peers")
@click.option("-m", "--model", default="smollm2", show_default=True, help="Alias, folder or hub id of the target.")
@click.option("--peer", "names", multiple=True, metavar="NAME", help="Peer to run; repeatable. --list shows them.")
@click.option("-d", "--drafter", "drafters", multiple=True, default=("auto",), help="Drafter of ours; repeatable.")
@click.option("-o", "options", multiple=True, metavar="DRAFTER.NAME=VALUE", help="Drafter option; repeatable.")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    default=("bf16",),
    help=f"Our weights: bf16, fp32, or quantized ({', '.join(QUANTIZED)}); repeatable.",
)
@click.option("--reference", metavar="ROW", help="Row of ours to compare with; the fastest by default.")
@click.option("--questions", type=click.Path(path_type=Path), help="A question.jsonl instead of MT-Bench's.")
@click.option("--limit", type=click.IntRange(min=1), help="So many questions, spread evenly over the categories.")
@click.option("-t", "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Per answer.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of every row; PyTorch's choice by default.")
@click.option("--block", type=click.IntRange(min=1), default=1, show_default=True, help="Questions in one go.")
@click.option("--loaded", type=click.IntRange(min=1), help="Peers in memory at a time; by default as many as fit.")
@click.option("--peers-dir", type=click.Path(path_type=Path), help="Folder of the peers' environments.")
@click.option("--cache-dir", default=CACHE_DIR, show_default=True, help="Folder for converted weights and logs.")
@click.option("--draft-model", type=click.Path(path_type=Path), help="Folder of a draft model, for assisted peers.")
@click.option("--gguf", type=click.Path(path_type=Path), help="The model as a GGUF file, for llama.cpp.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the intervals.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the result there.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run of the same --json.")
@click.option("--list", "only_list", is_flag=True, help="Show all peers, and how to install those that are missing.")
def peers(
    model: str,
    names: tuple[str, ...],
    drafters: tuple[str, ...],
    options: tuple[str, ...],
    dtypes: tuple[str, ...],
    reference: str | None,
    questions: Path | None,
    limit: int | None,
    max_new_tokens: int,
    threads: int | None,
    block: int,
    loaded: int | None,
    peers_dir: Path | None,
    cache_dir: str,
    draft_model: Path | None,
    gguf: Path | None,
    seed: int,
    json_path: Path | None,
    resume: bool,
    only_list: bool,
) -> None:
    """Compare specdec with other engines: same MODEL, questions and threads, question by question in one run.

    By default all peers run but those in fp32 and f16; one that is not installed is left out with the sentence that
    says how to install it. The table names every row's precision: compare like with like.
    """
    if only_list:
        click.echo(list_peers(peers_dir))
        return
    check_outputs(json_path, resume=resume)

    import torch

    from specdec.benchmarks.contenders import Sources, prepare_peers
    from specdec.benchmarks.masking import masked_arguments
    from specdec.benchmarks.peer_bench import encode_question, run_peers
    from specdec.benchmarks.peer_settings import PeerSettings
    from specdec.benchmarks.peers import DEFAULT_PEERS, get_peer
    from specdec.benchmarks.questions import load_questions
    from specdec.cli.bench.mt_bench import make_specs
    from specdec.cli.bench.peers_screen import PeersScreen, report
    from specdec.cli.console import note, slow_status
    from specdec.models import load_model
    from specdec.registry import resolve_drafter
    from specdec.target import HFTarget

    names = tuple(get_peer(name).name for name in names) or DEFAULT_PEERS
    precisions = {precision_of(dtype): dtype for dtype in dtypes}
    if "auto" not in drafters:  # else which options there are depends on the model
        make_specs(drafters, options)
    found = load_questions(questions)
    found = found if limit is None else found.limit(limit)
    if threads is not None:
        torch.set_num_threads(threads)
    targets = {}
    for precision, dtype in precisions.items():
        with slow_status(f"loading {model} in {precision}") as say:
            quantize = dtype if dtype in QUANTIZED else None
            weights = load_model(
                model, dtype="bf16" if quantize else dtype, device="cpu", packed=True, quantize=quantize, progress=say
            )
            targets[precision] = HFTarget(weights.model)
    tokenizer, target = weights.tokenizer, targets[precision]
    if tokenizer is None:
        raise ValueError(f"{model!r} has no tokenizer: questions are text")
    settings = PeerSettings(
        model=model, precisions=tuple(precisions),
        drafters=make_specs(drafters, options, resolve_drafter("auto", target)), peers=names,
        max_new_tokens=max_new_tokens, threads=torch.get_num_threads(), block=block, loaded=loaded,
        reference=reference, seed=seed,
    )  # fmt: skip
    longest = max(len(encode_question(question, tokenizer, target.vocab_size)) for question in found.questions)
    room = max(MAX_CONTEXT, longest + max_new_tokens + DRAFT_ROOM)
    folder, gguf_file = find_weights(model, weights, gguf)
    sources = Sources(Path(cache_dir).expanduser(), peers_dir, folder, gguf_file, draft_model)
    with slow_status("preparing peers") as say:
        ready, skipped = prepare_peers(
            names, sources, threads=settings.threads, max_context=min(room, target.max_context or room), say=say
        )
    for entrant in skipped:
        note(f"{entrant.name} does not run: {entrant.skipped}")
    note(f"questions: {found.name} ({found.source}), {len(found.questions)} of sha256 {found.sha256}")
    with resumable(json_path), PeersScreen() as screen:
        result = run_peers(
            targets, tokenizer, ready, skipped, settings, found, out=json_path, resume=resume,
            progress=screen.show, say=note, command=["specdec", *masked_arguments(sys.argv[1:])],
        )  # fmt: skip
    click.echo(report(result))
    if json_path is not None:
        note(f"wrote {json_path}")


def list_peers(peers_dir: Path | None) -> str:
    """A line on every peer, those that run by default marked, and whether its engine is there."""
    from specdec.benchmarks.peers import DEFAULT_PEERS, PEERS, availability
    from specdec.cli.bench.screen import align

    states = {spec.engine.name: availability(spec, peers_dir) or "available" for spec in PEERS.values()}
    rows: list[Sequence[str]] = [("peer", "precision", "speculation", "default", "engine")]
    for name, spec in PEERS.items():
        default = "yes" if name in DEFAULT_PEERS else ""
        rows.append((name, spec.precision, spec.speculation, default, states[spec.engine.name]))
    return align(rows, num_left=len(rows[0]))


def precision_of(dtype: str) -> str:
    """The name that peers give the precision of weights of a type: "fp32", "bf16" or "f16"; ours of quantized ones.

    Raises:
        ValueError: for another type; the sentence gives the choices.
    """
    import torch

    from specdec.models import DTYPES

    if dtype in QUANTIZED:
        return dtype
    precisions = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "f16"}
    found = precisions.get(DTYPES.get(dtype, torch.int8))
    if found is None:
        choices = ", ".join(name for name, meant in DTYPES.items() if meant in precisions)
        raise ValueError(f"unknown dtype {dtype!r} (choices: {choices})")
    return found


def find_weights(model: str, loaded: LoadedModel, gguf: Path | None) -> tuple[Path | None, Path | None]:
    """What peers load: the folder that the model came from, and the GGUF file it is or was converted from.

    Args:
        model: the name it was asked for by.
        loaded: what came of it.
        gguf: a file given for this; None to look for one.

    Returns:
        Folder and file, None where there is none.
    """
    from specdec.embedded import find_wheel_gguf
    from specdec.model_files import ALIASES

    origin: Any = getattr(loaded.model, "name_or_path", "")
    folder = Path(str(origin))
    if model.endswith(".gguf"):
        return None, gguf or Path(model).expanduser()
    if gguf is None and model in ALIASES:
        gguf = find_wheel_gguf()
    return (folder if (folder / "config.json").is_file() else None), gguf

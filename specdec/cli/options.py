"""Options that several commands share, and what they are turned into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from specdec.precisions import SCHEME_NAMES, STORED_NAMES

if TYPE_CHECKING:
    from specdec.decoder import SpecDecoder
    from specdec.sampling import SamplingParams

Command: TypeAlias = Callable[..., Any]
T = TypeVar("T")


@dataclass(frozen=True)
class ModelOptions:
    """What to load: a target, a drafter with its options, an acceptance policy."""

    model: str
    drafter: str
    drafter_options: tuple[str, ...]
    verifier: str
    dtype: str
    device: str
    draft_device: str | None
    allow_pickle: bool
    trust_remote_code: bool
    threads: int | None
    adaptive: bool
    memory_budget: str | None
    quantize: str | None
    kv: str | None
    draft_kv: str | None
    cuda_graphs: bool | None


quantize_option = click.option(
    "--quantize",
    metavar="NAME",
    help=f"Linear layers in {', '.join(SCHEME_NAMES)}, or in a .gguf file's own blocks ({' or '.join(STORED_NAMES)}).",
)
kv_option = click.option(
    "--kv", metavar="NAME", help="Precision of the KV cache: int8, int4 or int2; else the model's own."
)
graphs_option = click.option(
    "--cuda-graphs/--no-cuda-graphs", default=None, help="Capture the target's passes as CUDA graphs; not by default."
)

_MODEL = (
    click.option("-m", "--model", default="smollm2", show_default=True, help="Alias, folder or hub id of the target."),
    click.option("-d", "--drafter", default="auto", show_default=True, help="Drafter; `specdec list` shows them."),
    click.option("-o", "drafter_options", multiple=True, metavar="NAME=VALUE", help="Drafter option; repeatable."),
    click.option("--verifier", default="auto", show_default=True, help="Acceptance policy; see `specdec list`."),
    click.option("--dtype", default="auto", show_default=True, help="Weights' type: auto, fp32, bf16, fp16."),
    click.option("--device", default="auto", show_default=True, help="Where to run: auto, cpu, cuda, ..."),
    click.option("--draft-device", help="Where a draft model runs, if not where its drafter would put it."),
    click.option("--allow-pickle", is_flag=True, help="Load pickled weights, which can execute code."),
    click.option("--trust-remote-code", is_flag=True, help="Run modelling code that comes with the weights."),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads; PyTorch's choice by default."),
    click.option("--adaptive/--fixed-trees", default=True, help="Draft what pays, or what the drafter makes."),
    click.option("--memory-budget", metavar="SIZE", help="Most memory, weights included: 2GiB; else what is free."),
    quantize_option,
    kv_option,
    click.option("--draft-kv", metavar="NAME", help="The same of a draft model's KV cache."),
    graphs_option,
)

# No defaults here: what is not given is left to SamplingParams, so the two cannot disagree.
_SAMPLING = (
    click.option("-t", "--max-new-tokens", type=int, help="Most tokens to generate."),
    click.option("--temperature", type=float, help="0 is greedy."),
    click.option("--top-k", type=int, help="Keep the k most probable tokens."),
    click.option("--top-p", type=float, help="Keep the smallest set of tokens with this probability, in (0, 1]."),
    click.option("--min-p", type=float, help="Drop tokens below this share of the most probable one's probability."),
    click.option("--repetition-penalty", type=float, help="Above 1, tokens already there become less likely."),
    click.option("--seed", type=int, help="Same seed, same text, whatever the drafter."),
    click.option("--stop", multiple=True, help="End before this string; repeatable."),
)
_SAMPLING_NAMES = (
    "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop",
)  # fmt: skip


def model_options(command: Command) -> Command:
    """Add the options that say what to load; the command gets them as ``options: ModelOptions``."""

    @functools.wraps(command)
    def collect(**values: Any) -> Any:
        found = {name: values.pop(name) for name in ModelOptions.__dataclass_fields__}
        return command(options=ModelOptions(**found), **values)

    return _decorate(collect, _MODEL)


def sampling_options(command: Command) -> Command:
    """Add the fields of ``SamplingParams``; the command gets those that were given as ``sampling: dict``."""

    @functools.wraps(command)
    def collect(**values: Any) -> Any:
        found = {name: values.pop(name) for name in _SAMPLING_NAMES}
        return command(sampling={name: value for name, value in found.items() if value not in (None, ())}, **values)

    return _decorate(collect, _SAMPLING)


system_option = click.option("--system", help="System message that opens the chat.")


def _decorate(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def make_params(sampling: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters from the options given; raises ValueError for values that cannot be served."""
    from specdec.sampling import SamplingParams

    return SamplingParams(**sampling)


def split_assignments(assignments: tuple[str, ...]) -> dict[str, str]:
    """``name=value`` texts as a dictionary; raises ValueError for other texts and for a name given twice."""
    values: dict[str, str] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"-o takes NAME=VALUE, got {text!r}")
        if name in values:
            raise ValueError(f"-o {name} is given twice: {values[name]!r} and {value!r}")
        values[name] = value
    return values


def load_decoder(options: ModelOptions) -> SpecDecoder:
    """Load what the options name, with a spinner on stderr; what can fail without the weights fails first."""
    from specdec.cli.console import slow_status

    with slow_status(f"loading {options.model}") as say:
        import torch

        from specdec.decoder import SpecDecoder
        from specdec.registry import create_drafter

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        drafter_options = split_assignments(options.drafter_options)
        if options.drafter == "auto":  # others are made before the model loads anyway: a mistake shows at once
            create_drafter(options.drafter, drafter_options)
        return SpecDecoder(
            options.model, options.drafter, drafter_options=drafter_options, verifier=options.verifier,
            dtype=options.dtype, device=options.device, quantize=options.quantize, draft_device=options.draft_device,
            kv=options.kv, draft_kv=options.draft_kv, cuda_graphs=options.cuda_graphs, adaptive=options.adaptive,
            memory_budget=options.memory_budget, allow_pickle=options.allow_pickle,
            trust_remote_code=options.trust_remote_code, progress=say,
        )  # fmt: skip

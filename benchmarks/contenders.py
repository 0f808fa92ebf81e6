"""Who answers in a comparison: specdec in this process, and peers in processes of their own, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from specdec.benchmarks.peer_schema import Entrant
from specdec.benchmarks.peers import (
    PeerError,
    PeerHello,
    PeerMissing,
    PeerProcess,
    PeerReply,
    PeerSpec,
    engine_python,
    get_peer,
    prepare_weights,
    worker_command,
)
from specdec.benchmarks.peers.quiet import OWN
from specdec.benchmarks.schema import PLAIN
from specdec.benchmarks.settings import DrafterSpec
from specdec.decoder import SpecDecoder
from specdec.registry import create_drafter
from specdec.sampling import SamplingParams
from specdec.target import HFTarget


class Contender(ABC):
    """Somebody who continues prompts greedily, one at a time.

    Attributes:
        entrant: what the table says of it.
    """

    entrant: Entrant

    @property
    @abstractmethod
    def group(self) -> int | None:
        """The process group it computes in, ``quiet.OWN`` for this process; None while it is not loaded."""

    @abstractmethod
    def load(self) -> PeerHello:
        """Load everything; raises PeerError where that fails."""

    @abstractmethod
    def answer(self, prompt_ids: Sequence[int], max_new_tokens: int, eos_ids: Sequence[int]) -> PeerReply:
        """Continue a prompt; raises PeerError where that fails."""

    @abstractmethod
    def close(self) -> None:
        """Give back what ``load`` took; may be called at any time."""


class OurRow(Contender):
    """specdec with one target and one drafter.

    It is timed as the peers are: the tokens of the first pass end the prefill, and tokens are all that is asked for,
    so no text is made of them.

    Args:
        precision: what the target computes with, as peers name it.
        target: the model; rows of one precision share it.
        tokenizer: its tokenizer, for drafters that need one.
        spec: the drafter; None for plain decoding.
        adaptive: draft no more than pays.
    """

    def __init__(
        self, precision: str, target: HFTarget, tokenizer: Any, spec: DrafterSpec | None, adaptive: bool = True
    ) -> None:
        name = f"specdec-{precision}" + (f"-{spec.label}" if spec else "")
        speculation = spec.label if spec else PLAIN
        self.entrant = Entrant(name=name, engine="specdec", precision=precision, speculation=speculation, ours=True)
        self.target = target
        self._tokenizer = tokenizer
        self._spec = spec
        self._adaptive = adaptive
        self._decoder: SpecDecoder | None = None

    @property
    def group(self) -> int | None:
        """This process, once there is a decoder."""
        return None if self._decoder is None else OWN

    def load(self) -> PeerHello:
        """Make the decoder; what its drafter remembers begins anew."""
        from specdec import __version__

        start = perf_counter()
        drafter = create_drafter(self._spec.name, self._spec.options) if self._spec else PLAIN
        self._decoder = SpecDecoder(
            self.target, drafter, tokenizer=self._tokenizer, adaptive=self._adaptive, on_drafter_error="raise",
            keep_prefixes=False,
        )  # fmt: skip
        self._decoder.tokenizer = None
        return PeerHello(__version__, 1000.0 * (perf_counter() - start))

    def answer(self, prompt_ids: Sequence[int], max_new_tokens: int, eos_ids: Sequence[int]) -> PeerReply:
        """See ``Contender``; the text ends at the target's own end tokens, which are ``eos_ids``."""
        if self._decoder is None:
            raise PeerError(f"{self.entrant.name} is not loaded")
        params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0, ignore_eos=not eos_ids)
        first_tokens, first = 0, None
        start = perf_counter()
        with self._decoder.stream(list(prompt_ids), params) as stream:
            for piece in stream:
                if first is None:
                    first_tokens += 1
                    if not piece.from_draft:  # the bonus token, every pass's last
                        first = perf_counter()
            end = perf_counter()
            result = stream.result
        if result.error:
            raise RuntimeError(f"{self.entrant.name}: {result.error}")
        first = first or end
        stats, drafts = result.stats, self._spec is not None
        return PeerReply(
            token_ids=tuple(result.token_ids),
            prompt_tokens=len(prompt_ids),
            prefill_ms=1000.0 * (first - start),
            decode_ms=1000.0 * (end - first),
            first_tokens=first_tokens,
            passes=stats.passes - 1,
            drafted=stats.drafted if drafts else None,
            accepted=stats.accepted if drafts else None,
        )

    def close(self) -> None:
        """Nothing: the decoder keeps what its drafter has learnt, and the target is shared."""


class PeerRow(Contender):
    """A peer in a worker process.

    Args:
        spec: the peer.
        command: the worker's command line.
        log_path: where the worker's messages go.
        limits: timeouts of ``PeerProcess``.
    """

    def __init__(self, spec: PeerSpec, command: Sequence[str], log_path: Path, **limits: float) -> None:
        self.entrant = entrant_of(spec)
        self._process = PeerProcess(command, name=spec.name, log_path=log_path, **limits)

    @property
    def group(self) -> int | None:
        """The worker's process group, which it leads."""
        return self._process.pid

    def load(self) -> PeerHello:
        """Start the worker; see ``PeerProcess.start``."""
        return self._process.start()

    def answer(self, prompt_ids: Sequence[int], max_new_tokens: int, eos_ids: Sequence[int]) -> PeerReply:
        """See ``PeerProcess.generate``."""
        return self._process.generate(prompt_ids, max_new_tokens, eos_ids)

    def close(self) -> None:
        """End the worker."""
        self._process.close()


def entrant_of(spec: PeerSpec) -> Entrant:
    """What the table says of a peer, whether it runs or not."""
    return Entrant(name=spec.name, engine=spec.engine.title, precision=spec.precision, speculation=spec.speculation)


@dataclass(frozen=True)
class Sources:
    """Where peers find what they run.

    Attributes:
        cache_dir: folder for converted weights and logs; made where it is missing.
        peers_dir: folder of the engines' environments; None for engines of this interpreter alone.
        model_folder: the model as a Hugging Face folder.
        gguf_file: the model as a GGUF file.
        draft_model: folder of the draft model for assisted generation.
    """

    cache_dir: Path
    peers_dir: Path | None = None
    model_folder: Path | None = None
    gguf_file: Path | None = None
    draft_model: Path | None = None


def prepare_peers(
    names: Sequence[str],
    sources: Sources,
    *,
    threads: int,
    max_context: int,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[list[PeerRow], list[Entrant]]:
    """Find engines and make the weights of peers; nothing is started.

    Args:
        names: peers by name.
        sources: where to look.
        threads: threads of every engine.
        max_context: tokens of prompt and output that engines must have room for.
        say: told in a few words what may take long.

    Returns:
        The peers that can run, and those that cannot, which say why in ``skipped``.

    Raises:
        ValueError: for an unknown name.
    """
    ready: list[PeerRow] = []
    skipped: list[Entrant] = []
    for spec in [get_peer(name) for name in names]:
        try:
            say(f"preparing {spec.name}")
            ready.append(_prepare(spec, sources, threads, max_context))
        except PeerError as error:
            skipped.append(replace(entrant_of(spec), skipped=one_line(error)))
    return ready, skipped


def _prepare(spec: PeerSpec, sources: Sources, threads: int, max_context: int) -> PeerRow:
    python = engine_python(spec.engine, sources.peers_dir)
    draft_model = sources.draft_model if spec.needs_draft_model else None
    if spec.needs_draft_model and draft_model is None:
        raise PeerMissing(f"the peer {spec.name} needs a draft model: give its folder with --draft-model")
    weights = prepare_weights(
        spec, sources.cache_dir, model_folder=sources.model_folder, gguf_file=sources.gguf_file, python=python
    )
    command = worker_command(
        spec, weights, python=python, threads=threads, draft_model=draft_model, max_context=max_context
    )
    return PeerRow(spec, command, sources.cache_dir / "logs" / f"{spec.name}.log")


def one_line(error: PeerError) -> str:
    """An error's first line, and the last one of what it quotes from a log."""
    first, *quoted = str(error).splitlines()
    last = next((line.strip() for line in reversed(quoted) if line.strip()), "")
    return f"{first} {last}".strip()

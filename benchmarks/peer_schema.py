"""What the comparison with peers writes: plain dataclasses that turn into JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from specdec.benchmarks.peers import PeerReply
from specdec.benchmarks.questions import Question
from specdec.benchmarks.schema import SCHEMA, Interval

KIND = "peers"


@dataclass(frozen=True)
class PeerRun:
    """One answer to one question. Times begin with the request; loading and warming up are not in them.

    Attributes:
        question_id: the question.
        category: its category.
        name: the row that answered: a peer, or specdec in one precision with one drafter.
        prompt_tokens: length of the prompt.
        new_tokens: tokens of the answer.
        first_tokens: those of them that came with the first pass.
        prefill_ms: from the request to the first token.
        decode_ms: from the first token to the last.
        passes: passes of the target after the one that brought the first token; None where the engine does not tell.
        drafted: tokens drafted; None where unknown or without speculation.
        accepted: drafted tokens kept; None likewise.
        token_sha256: hash of the token ids.
        busy: rows whose processes still computed when this one began.
        foreign_cpus: processors kept busy meanwhile by anything but this row's processes; None where unknown.
    """

    question_id: int
    category: str
    name: str
    prompt_tokens: int
    new_tokens: int
    first_tokens: int
    prefill_ms: float
    decode_ms: float
    passes: int | None
    drafted: int | None
    accepted: int | None
    token_sha256: str
    busy: tuple[str, ...] = ()
    foreign_cpus: float | None = None

    @property
    def decode_tokens(self) -> int:
        """Tokens that came after the first pass."""
        return self.new_tokens - self.first_tokens

    @property
    def total_ms(self) -> float:
        """From the request to the last token."""
        return self.prefill_ms + self.decode_ms

    @classmethod
    def of(
        cls, question: Question, name: str, reply: PeerReply, busy: tuple[str, ...], foreign_cpus: float | None
    ) -> PeerRun:
        """The run that a reply makes."""
        return cls(
            question.question_id, question.category, name, reply.prompt_tokens, len(reply.token_ids),
            reply.first_tokens, reply.prefill_ms, reply.decode_ms, reply.passes, reply.drafted, reply.accepted,
            hashlib.sha256(json.dumps(reply.token_ids).encode()).hexdigest(), busy, foreign_cpus,
        )  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PeerRun:
        """The inverse of ``dataclasses.asdict``; raises ValueError for missing or unknown fields."""
        return cls(**_with_tuple(cls, data, "busy"))


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A row of the comparison and what became of it.

    Attributes:
        name: unique in the comparison.
        engine: the engine's title.
        precision: what it computes with.
        speculation: "none", a peer's kind, or one of specdec's drafters.
        ours: whether it is specdec.
        version: the engine's version; None where it never ran.
        load_ms: milliseconds of the first start, loading and compiling included.
        notes: sentences that a reader of the figures must know.
        skipped: why it did not run at all; None where it did.
        failed: why it was left out from some question on; None where it answered all.
    """

    name: str
    engine: str
    precision: str
    speculation: str
    ours: bool = False
    version: str | None = None
    load_ms: float | None = None
    notes: tuple[str, ...] = ()
    skipped: str | None = None
    failed: str | None = None

    @property
    def out(self) -> bool:
        """Whether it answers no further questions."""
        return self.skipped is not None or self.failed is not None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Entrant:
        """The inverse of ``dataclasses.asdict``; raises ValueError for missing or unknown fields."""
        return cls(**_with_tuple(cls, data, "notes"))


@dataclass(frozen=True, kw_only=True)
class PeerFigures(Entrant):
    """What a row's runs amount to; figures are None where there is nothing to compute them from.

    Attributes:
        num_runs: questions answered.
        decode_tokens_per_s: tokens after the first pass over the time from the first token to the last.
        end_to_end_tokens_per_s: all new tokens over the time from the request to the last token.
        prefill_tokens_per_s: prompt tokens over the time to the first token.
        tau: tokens per target pass, the first pass left out.
        relative: median over questions of the reference row's decode speed divided by this row's, with its interval;
            above 1 the reference is faster. None for the reference itself.
        end_to_end_relative: the same of the end-to-end speed.
        equal_to_plain: questions whose tokens equal those of specdec's plain decoding in the same precision; None where
            that did not run, for quantised engines, and for plain decoding itself.
        equal_to_own_plain: of a row that speculates, questions whose tokens equal those of the same engine in the same
            precision without speculation; None where that did not run.
        own_plain_runs: questions that both answered.
        unsettled_runs: runs that began while another row's processes computed.
        disturbed_runs: runs during which others kept more than ``DISTURBED_CPUS`` processors busy.
    """

    num_runs: int = 0
    decode_tokens_per_s: float | None = None
    end_to_end_tokens_per_s: float | None = None
    prefill_tokens_per_s: float | None = None
    tau: float | None = None
    relative: Interval | None = None
    end_to_end_relative: Interval | None = None
    equal_to_plain: int | None = None
    equal_to_own_plain: int | None = None
    own_plain_runs: int = 0
    unsettled_runs: int = 0
    disturbed_runs: int = 0


@dataclass(frozen=True)
class PeersResult:
    """The whole result; fields of the same name are as in ``BenchResult``.

    Attributes:
        runs: all of them, in the order they ran.
        peers: figures, specdec's rows first, in the order they were asked for.
        resumed_after: numbers of runs after which the benchmark was interrupted and resumed.
    """

    date: str
    command: list[str]
    commit: str | None
    machine: dict[str, Any]
    versions: dict[str, str | None]
    settings: dict[str, Any]
    questions: dict[str, Any]
    runs: list[PeerRun]
    peers: list[PeerFigures]
    resumed_after: list[int] = field(default_factory=list)
    kind: str = KIND

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dumps``; ``tables.peers_table`` reads them."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "peers"}
        summary = {"peers": [asdict(found) for found in self.peers]}
        return {"schema": SCHEMA} | plain | {"runs": [asdict(run) for run in self.runs], "summary": summary}


def _with_tuple(cls: type[Any], data: dict[str, Any], name: str) -> dict[str, Any]:
    """A class's fields as JSON has them, one list a tuple again."""
    known = {f.name for f in fields(cls)}
    if data.keys() != known:
        differing = sorted(data.keys() ^ known)
        raise ValueError(f"{cls.__name__}: missing or unknown fields {differing}")
    return data | {name: tuple(data[name])}

"""What a benchmark writes, version 1: plain dataclasses that turn into JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

SCHEMA = 1
"""Version of the JSON; readers refuse any other."""

PLAIN = "none"
"""Label of plain decoding."""


@dataclass(frozen=True)
class Difference:
    """Where a text leaves plain decoding's for the first time.

    Attributes:
        question_id: the question, in a batch one of several.
        position: index of the first new token that differs.
        plain_token: plain decoding's token; None where it has ended.
        token: the run's token; None where it has ended.
        gap: distance of the two candidates' scores, which is that of their log-probabilities, position noise included;
            None where one of them cannot be chosen at all.
        bound: largest gap that rounding explains, measured at this position.
        rounding: whether rounding explains the difference.
    """

    question_id: int
    position: int
    plain_token: int | None
    token: int | None
    gap: float | None
    bound: float
    rounding: bool


@dataclass(frozen=True)
class Run:
    """One call: a turn of one question, or of several decoded together, by one drafter.

    Attributes:
        repeat: number of the repeat, from 0.
        question_id: the first question of the call.
        question_ids: all of them.
        category: their category, "mixed" where they differ.
        turn: from 1.
        drafter: label; "none" is plain decoding.
        prompt_tokens: of all rows together, as are ``emitted``, ``passes``, ``drafted`` and ``accepted``.
        emitted: tokens emitted.
        passes: target passes, counted once for every row that took part.
        steps: target passes, counted once; equals ``passes`` for a single question.
        drafted: draft nodes proposed.
        accepted: draft nodes accepted.
        accepted_per_pass: passes by count of accepted nodes.
        offered_depth: passes by depth of the tree offered.
        context_tokens: cached tokens read per step, all rows together, on average.
        milliseconds: wall-clock per phase.
        first_token_ms: from the call to the first token.
        wall_ms: the whole call.
        equal: whether the tokens equal plain decoding's; None where they need not, and for plain decoding itself.
        difference: the first difference; of several rows' the first that rounding does not explain.
        token_sha256: hash of the token ids.
    """

    repeat: int
    question_id: int
    question_ids: tuple[int, ...]
    category: str
    turn: int
    drafter: str
    prompt_tokens: int
    emitted: int
    passes: int
    steps: int
    drafted: int
    accepted: int
    accepted_per_pass: dict[int, int]
    offered_depth: dict[int, int]
    context_tokens: float
    milliseconds: dict[str, float]
    first_token_ms: float
    wall_ms: float
    token_sha256: str
    equal: bool | None = None
    difference: Difference | None = None

    @property
    def decode_ms(self) -> float:
        """Wall-clock of all phases but prefill."""
        return sum(value for phase, value in self.milliseconds.items() if phase != "prefill")

    def to_json(self) -> dict[str, Any]:
        """Plain values; counts are keyed by text, as JSON wants it."""
        counts = {
            name: {str(k): v for k, v in sorted(getattr(self, name).items())}
            for name in ("accepted_per_pass", "offered_depth")
        }
        return asdict(self) | counts | {"question_ids": list(self.question_ids)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Run:
        """The inverse of ``to_json``; raises ValueError for missing or unknown fields."""
        values = _checked(cls, data)
        for name in ("accepted_per_pass", "offered_depth"):
            values[name] = {int(k): int(v) for k, v in values[name].items()}
        values["question_ids"] = tuple(values["question_ids"])
        values["difference"] = _optional(Difference, values.get("difference"))
        return cls(**values)


@dataclass(frozen=True)
class Interval:
    """A median and its bootstrap percentile 95 % interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Figures:
    """What a set of runs of one drafter amounts to.

    Attributes:
        num_runs: runs behind the figures.
        emitted: tokens emitted.
        decode_tokens_per_s: emitted tokens over the time of all phases but prefill.
        end_to_end_tokens_per_s: emitted tokens over wall-clock.
        speedup: of decoding, over plain decoding of the same questions in the same repeat; None for plain decoding.
        end_to_end_speedup: the same for wall-clock.
        tau: emitted tokens per target pass.
        acceptance_by_depth: entry d-1: of the passes whose tree reached depth d, the share that accepted a node there.
        milliseconds_per_pass: by phase, prefill left out.
        first_token_ms: median.
        equal_runs: runs whose tokens equal plain decoding's.
        differing_runs: runs that differ, by rounding.
        roofline_fraction: time the weights and the KV cache need at the measured bandwidth, over the target's time.
    """

    num_runs: int
    emitted: int
    decode_tokens_per_s: float
    end_to_end_tokens_per_s: float
    speedup: Interval | None
    end_to_end_speedup: Interval | None
    tau: float
    acceptance_by_depth: list[float]
    milliseconds_per_pass: dict[str, float]
    first_token_ms: float
    equal_runs: int
    differing_runs: int
    roofline_fraction: float

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Figures:
        """The inverse of ``dataclasses.asdict``."""
        values = _checked(cls, data)
        for name in ("speedup", "end_to_end_speedup"):
            values[name] = _optional(Interval, values[name])
        return cls(**values)


@dataclass(frozen=True)
class CategoryFloor:
    """Whether speculation made any category slower than is allowed.

    Attributes:
        required: least speed-up over plain decoding.
        below: drafters with a category whose median is lower: drafter, category, speed-up.
    """

    required: float
    below: list[tuple[str, str, Interval]]

    @property
    def met(self) -> bool:
        """Whether no category of any drafter is below."""
        return not self.below

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CategoryFloor:
        """The inverse of ``dataclasses.asdict``."""
        values = _checked(cls, data)
        values["below"] = [(label, category, Interval(**found)) for label, category, found in values["below"]]
        return cls(**values)


@dataclass(frozen=True)
class Summary:
    """Figures by label, of all questions and of each category.

    Attributes:
        floor: whether every category is fast enough; None in results from before it was asked.
        peak_memory_bytes: most memory the process had (resident; on a GPU, allocated there).
        latency_curve: pairs of tree nodes and median milliseconds of a pass over 512 cached tokens.
    """

    overall: dict[str, Figures]
    categories: dict[str, dict[str, Figures]]
    peak_memory_bytes: int = 0
    latency_curve: list[tuple[int, float]] = field(default_factory=list)
    floor: CategoryFloor | None = None

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Summary:
        """The inverse of ``dataclasses.asdict``."""
        values = _checked(cls, data)
        values["overall"] = {label: Figures.from_json(f) for label, f in values["overall"].items()}
        values["categories"] = {
            category: {label: Figures.from_json(f) for label, f in found.items()}
            for category, found in values["categories"].items()
        }
        values["latency_curve"] = [(int(nodes), float(ms)) for nodes, ms in values["latency_curve"]]
        if values.get("floor") is not None:
            values["floor"] = CategoryFloor.from_json(values["floor"])
        return cls(**values)


@dataclass(frozen=True)
class BenchResult:
    """A benchmark's whole result.

    Attributes:
        kind: which benchmark.
        date: when it began, ISO 8601, UTC.
        command: the command line.
        commit: of the source, with "-dirty" where files differ from it; None outside a checkout.
        machine: see ``record.machine``.
        versions: of Python and packages; None for those missing.
        settings: what was asked for.
        questions: name, source, sha256 and count of the question set.
        bandwidth_gb_s: measured read bandwidth, 1e9 bytes per second.
        weight_bytes: bytes of weights a pass reads.
        kv_bytes_per_token: bytes of keys and values per cached token.
        runs: all of them, in the order they ran.
        summary: their figures.
        resumed_after: numbers of runs after which the benchmark was interrupted and resumed; drafters that remember
            earlier texts began anew there.
    """

    kind: str
    date: str
    command: list[str]
    commit: str | None
    machine: dict[str, Any]
    versions: dict[str, str | None]
    settings: dict[str, Any]
    questions: dict[str, Any]
    bandwidth_gb_s: float
    weight_bytes: int
    kv_bytes_per_token: int
    runs: list[Run]
    summary: Summary
    resumed_after: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dumps``."""
        summary = asdict(self.summary)
        summary["latency_curve"] = [list(point) for point in self.summary.latency_curve]
        if summary["floor"] is not None:
            summary["floor"]["below"] = [list(found) for found in summary["floor"]["below"]]
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"schema": SCHEMA} | plain | {"runs": [run.to_json() for run in self.runs], "summary": summary}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BenchResult:
        """The inverse of ``to_json``; raises ValueError for another schema, missing or unknown fields."""
        if data.get("schema") != SCHEMA:
            raise ValueError(f"a result of schema {SCHEMA} is needed, got {data.get('schema')!r}")
        values = _checked(cls, {name: value for name, value in data.items() if name != "schema"})
        values["runs"] = [Run.from_json(run) for run in values["runs"]]
        values["summary"] = Summary.from_json(values["summary"])
        return cls(**values)


def _checked(cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``data``, once its fields are those of the class."""
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
    missing = sorted(name for name, required in known.items() if required and name not in data)
    surplus = sorted(set(data) - set(known))
    if missing or surplus:
        raise ValueError(f"{cls.__name__}: missing fields {missing}, unknown fields {surplus}")
    return dict(data)


def _optional(cls: type[Any], data: Mapping[str, Any] | None) -> Any:
    return None if data is None else cls(**_checked(cls, data))

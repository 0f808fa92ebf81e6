"""SpecDecoder: a target, a drafter and an acceptance policy, ready to generate."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from specdec.acceptance import Experience
from specdec.adaptive import AdaptiveTrees
from specdec.batch import Row
from specdec.call_memory import CallMemory
from specdec.drafters.base import Drafter
from specdec.drafters.none import NoneDrafter
from specdec.filling import PASS_TOKENS
from specdec.generation import Generation
from specdec.graphs import check_graphs, make_target
from specdec.kept_prefix import KeptPrefix
from specdec.kv_quantized import find_kv, quantize_draft_kv
from specdec.latency import LatencyCurve, LatencyKey, load_curve
from specdec.memory import parse_size
from specdec.memory_plan import MemoryPlan, Workload, spare_behind, tree_size
from specdec.placement import check_in_step, with_draft_device
from specdec.planner import CAUTIOUS_CPU, CAUTIOUS_GPU, RUNGS, PassTimes
from specdec.policy import NO_LIMIT, FixedTrees, TreePolicy
from specdec.prefix import SharedWork
from specdec.prefix_store import KeptText, PrefixStore
from specdec.prompts import Message, Prompt, encode_prompt, split_prompts
from specdec.registry import check_verifier, create_drafter, create_verifier, resolve_drafter, unknown
from specdec.result import GenerationStream
from specdec.sampling import PositionNoise, SamplingParams, derive_seed
from specdec.stats import DecodeStats
from specdec.target import HFTarget
from specdec.text import TextStream
from specdec.verifiers.base import Verifier

if TYPE_CHECKING:
    from specdec.serving import Server


class SpecDecoder:
    """Generates with a target model, checking a drafter's token trees in single passes.

    The text is the target's own: greedy decoding token for token, sampling in distribution, unless a policy that says
    it is lossy is asked for.

    Args:
        target: alias, folder, hub id, a loaded transformers model, or an ``HFTarget``.
        drafter: name of a drafter, "auto", or a ``Drafter``.
        drafter_options: options of a drafter given by name; see its ``Config``.
        verifier: "auto" (greedy at temperature 0, else coupled), a policy's name, or a ``Verifier``. At temperature 0
            every lossless policy is greedy.
        tokenizer: needed for text with a model that was passed in loaded.
        dtype: of the weights when loading: "auto", a name such as "bf16", or a torch dtype.
        device: where to load the target: "auto" or a torch device.
        draft_device: where a draft model goes, None for its drafter's own choice; see docs/draft-models.md.
        quantize: precision of the linear layers' weights when loading, a name of ``specdec.quantization``'s; the text
            is then the quantized model's own.
        kv: precision of the target's KV cache, "int8", "int4" or "int2" (see ``specdec.kv_quantized``), None for the
            model's own; the text is then that of this cache, with speculation and without.
        draft_kv: the same of a draft model's.
        cuda_graphs: True captures the target's passes over trees as CUDA graphs (see ``specdec.graphs``), False does
            not; None leaves it to specdec, which does not so far. An ``HFTarget`` is what it was built as.
        invariant: True refuses a target whose rounding depends on what rides in a pass, where texts could differ from
            plain decoding's at near-ties; None takes it, and ``decoder.target.invariant`` says which it is. Where rows
            can be independent they always are: it costs nothing.
        adaptive: draft no more than pays, down to plain decoding and back, as observed; texts stay the same. Where a
            text does depend on the trees (the rejection policy's) and a seed asks for it to be repeatable, trees stay
            as the drafter makes them, since a clock must not choose the text.
        latency: what passes cost, instead of what is measured while decoding.
        memory_budget: bytes in all, weights included, as a number or "2GiB"; None is what is free. A call that does not
            fit gets smaller trees, then fewer rows at a time; where even one row without drafts does not, it raises.
        max_rows: of a call that are decoded at a time; the others take the places of rows that end. None is as many as
            memory allows. (``serve`` has its own.)
        prefix_memory: bytes that prefixes kept across calls may take, see ``prefix``.
        share_prefixes: compute and hold once what prompts of a call begin with alike; False is there to compare with.
        keep_prefixes: keep, as ``prefix`` does, what prompts of successive calls begin with alike, as far as
            ``prefix_memory`` goes; None does where texts are the same to the bit with it and without (``invariant``).
        on_drafter_error: "warn" goes on without the drafter for the rest of the call, "raise" raises.
        allow_pickle: load pickled weights, which can execute code.
        trust_remote_code: run modelling code that comes with the weights.
        progress: told in a few words what takes long while the target loads.
    """

    def __init__(
        self,
        target: str | Path | HFTarget | Any,
        drafter: str | Drafter = "auto",
        *,
        drafter_options: Mapping[str, Any] | None = None,
        verifier: str | Verifier = "auto",
        tokenizer: Any | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        quantize: str | None = None,
        draft_device: str | torch.device | None = None,
        kv: str | None = None,
        draft_kv: str | None = None,
        cuda_graphs: bool | None = None,
        invariant: Literal[True] | None = None,
        adaptive: bool = True,
        latency: LatencyCurve | None = None,
        memory_budget: int | str | None = None,
        max_rows: int | None = None,
        prefix_memory: int | str = "1GiB",
        share_prefixes: bool = True,
        keep_prefixes: bool | None = None,
        on_drafter_error: Literal["warn", "raise"] = "warn",
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        if on_drafter_error not in ("warn", "raise"):
            raise ValueError(f"on_drafter_error must be 'warn' or 'raise', got {on_drafter_error!r}")
        if max_rows is not None and (not isinstance(max_rows, int) or max_rows < 1):
            raise ValueError(f"max_rows must be a whole number, at least 1, got {max_rows!r}")
        self._max_rows = max_rows
        budget, most_kept = None if memory_budget is None else parse_size(memory_budget), parse_size(prefix_memory)
        self._share_prefixes = share_prefixes
        if isinstance(drafter, Drafter) and drafter_options:
            raise ValueError("drafter_options go with a drafter's name; this drafter is constructed already")
        if draft_device is not None:
            drafter_options = with_draft_device(drafter, drafter_options, draft_device)
        if isinstance(verifier, str):
            check_verifier(verifier)
        if isinstance(drafter, str) and drafter != "auto":
            drafter = create_drafter(drafter, drafter_options)  # before the target loads: a mistake shows at once
        if quantize is not None and not isinstance(target, str | Path):
            raise ValueError(
                f"quantize={quantize!r} goes with a name to load; this model is loaded already: "
                "specdec.quantization.quantize_linears(model, name) does it in place"
            )
        kv_bits = find_kv(kv)
        find_kv(draft_kv)
        if kv is not None and isinstance(target, HFTarget):
            raise ValueError(f"kv={kv!r} goes with a model; this is an HFTarget already: set its kv_bits = {kv_bits}")
        if cuda_graphs is not None and isinstance(target, HFTarget):
            raise ValueError(
                f"cuda_graphs={cuda_graphs} goes with a model; this is a {type(target).__name__} already: give its "
                "model, or build it as specdec.graphs.GraphTarget(model)"
            )
        if isinstance(target, str | Path):
            from specdec.models import find_device, load_model

            check_graphs(cuda_graphs, find_device(device), kv_bits)
            loaded = load_model(
                str(target), dtype=dtype, device=device, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
                packed=True, quantize=quantize, progress=progress, memory_budget=budget, drafter=drafter,
            )  # fmt: skip
            target, tokenizer = loaded.model, tokenizer if tokenizer is not None else loaded.tokenizer
        self.target = target if isinstance(target, HFTarget) else make_target(target, kv_bits, cuda_graphs)
        if invariant and not self.target.invariant:
            raise ValueError(
                f"invariant=True: rounding of {type(self.target.model).__name__} in {self.target.dtype} on "
                f"{self.target.device} depends on what rides in a pass; it does not for Llama, Mistral, Qwen2 and "
                "Qwen3 loaded by name with dtype='bf16' on a CPU with a C compiler, quantized or not, but to nf4 or fp6"
            )
        if isinstance(drafter, str):
            drafter = create_drafter(resolve_drafter(drafter, self.target), drafter_options)
        self.drafter = drafter
        self.tokenizer = tokenizer
        self._verifier = verifier
        self._on_drafter_error = on_drafter_error
        self._adaptive = adaptive and not isinstance(drafter, NoneDrafter)
        self._times = None if latency is None else PassTimes(latency, learn=False)
        self._experience: Experience | None = None
        self._calls = 0
        self._running: weakref.ref[GenerationStream] | weakref.ref[Server] | None = None
        self._vocabulary = torch.arange(self.target.vocab_size, device=self.target.device)
        check_in_step(self.drafter, self._adaptive)
        self.drafter.bind(self.target, tokenizer)
        if draft_kv is not None:
            quantize_draft_kv(self.drafter, self.target, draft_kv)
        self._memory = CallMemory(self.target, self.drafter, budget, most_kept, keep_prefixes)
        self.memory_plan: MemoryPlan | None = None
        """What the last call was planned to take, None before the first."""
        self.stats = DecodeStats()
        """Counts and times of the last call, all rows together."""

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None, **fields: Any
    ) -> Any:  # GenerationResult for one prompt with n=1, else list[GenerationResult]
        """Complete one prompt or several.

        Args:
            prompts: text, token ids or chat messages; or a list of those, decoded together.
            params: how to choose and where to end.
            fields: fields of ``SamplingParams``, as keywords; they override those of ``params``.

        Returns:
            A ``GenerationResult`` for a single prompt with ``n=1``; else a list, prompt-major, n per prompt.

        Raises:
            ValueError: for prompts or parameters that cannot be served.
        """
        params = merge_params(params, fields)
        _, many = split_prompts(prompts)
        with self.stream(prompts, params) as stream:
            for _ in stream:
                pass
            return stream.results if many or params.n > 1 else stream.result

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, **fields: Any) -> Any:
        """Answer a chat; arguments and result as ``generate``."""
        return self.generate(messages, params, **fields)

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        kept: KeptPrefix | None = None,
        **fields: Any,
    ) -> GenerationStream:
        """Like ``generate``, piece by piece as tokens are emitted.

        A decoder runs one generation at a time: starting another ends one still open as "cancelled".

        Args:
            kept: with one prompt and n=1, the cache of an earlier generation: what the prompt shares with it is not
                computed again, and it is brought up to date when this generation ends.
        """
        params = merge_params(params, fields)
        verifier = self._pick_verifier(params)
        rows = self._make_rows(split_prompts(prompts)[0], params, verifier)
        if kept is not None and len(rows) != 1:
            raise ValueError(f"a kept prefix serves one row, this call has {len(rows)}")
        generation = self._make_generation(rows, params, verifier, kept=kept)
        self._end_running()  # a drafter keeps the state of one generation
        self.stats = generation.stats
        stream = GenerationStream(generation.run(), rows, generation.stats)
        self._running = weakref.ref(stream)
        return stream

    def serve(self, max_rows: int = 8, max_waiting: int = 64, pass_tokens: int = PASS_TOKENS) -> Server:
        """Serve requests of many clients at a time: ``async with decoder.serve() as server``.

        Args:
            max_rows: decoded at a time.
            max_waiting: requests that may wait for a place; handing in another waits.
            pass_tokens: nodes of a pass, those of decoding rows and of prompts that ride along; larger ones answer a
                request sooner, and keep the others waiting longer for their next token.
        """
        from specdec.serving import Server

        return Server(self, max_rows, max_waiting, pass_tokens)

    def _take_over(self, server: Server) -> None:
        self._end_running()
        self._running = weakref.ref(server)

    def _end_running(self) -> None:
        running = None if self._running is None else self._running()
        if running is not None:
            running.close()

    def _make_request(
        self, prompt: Prompt, params: SamplingParams | None, fields: Mapping[str, Any]
    ) -> tuple[Row, SamplingParams]:
        """A served request's row; raises ValueError where it cannot be served, even alone."""
        params = merge_params(params, fields)
        if params.n != 1:
            raise ValueError(f"a request is one completion, got n={params.n}: submit it as often")
        row = self._make_rows([prompt], params, self._pick_verifier(params))[0]
        self._fits([row], self._shared_work([row]))
        return row, params

    def _fits(self, rows: Sequence[Row], shared: SharedWork | None) -> bool:
        """Whether all these rows may run at a time. Raises ValueError where not even one may."""
        plan = self._plan_memory(rows, shared, joins=True)
        fits, left = plan.rows >= len(rows), self._memory.beside(plan)
        if fits and left is not None and self.prefixes.limit is not None:
            self.prefixes.limit = min(self.prefixes.limit, left)
        return fits

    def _shared_work(self, rows: Sequence[Row]) -> SharedWork | None:
        """What the prompts of a call share; None where nobody looks for it."""
        prompts = [tuple(row.tokens[: row.prompt_len - 1]) for row in rows]
        return SharedWork.of(prompts) if self._share_prefixes else None

    def _make_generation(
        self,
        rows: Sequence[Row],
        params: SamplingParams,
        verifier: Verifier,
        most_rows: int | None = None,
        kept: KeptPrefix | None = None,
        pass_tokens: int = PASS_TOKENS,
        start: Sequence[Row] | None = None,
    ) -> Generation:
        """A generation planned for ``rows``, with those of ``start`` in it; with all of them where None."""
        policy, limit = self._pick_policy(verifier, params), self._max_rows
        shared = self._shared_work(rows)
        if start is None and limit is not None and limit < len(rows):
            start, rows = rows, sorted(rows, key=lambda row: row.max_len)[-limit:]
        spare = self._pick_spare(rows, policy, verifier) if start is None else None
        plan = self.memory_plan = self._plan_memory(rows, shared, start is not None, spare)
        self.prefixes.limit = self._memory.beside(plan)
        together = plan.rows >= len(rows)
        rows = rows if start is None else start
        return Generation(
            self.target, self.drafter, verifier, rows, kept, self._on_drafter_error == "raise",
            policy if plan.nodes > 1 else FixedTrees(),
            NO_LIMIT if plan.nodes >= tree_size(self.drafter) else plan.nodes, most_rows or plan.rows, self.prefixes,
            pass_tokens, self._share_prefixes, spare if together else None, _may_vary(verifier, params),
        )  # fmt: skip

    @property
    def prefixes(self) -> PrefixStore:
        """What is kept across calls."""
        return self._memory.prefixes

    @contextmanager
    def prefix(self, prompt: Prompt) -> Iterator[KeptText]:
        """Keep the beginning that many prompts share, a system message for one, computed once.

        Prompts of any call that begin with the same tokens, or some of them, build on it. It is kept for sure within
        the ``with`` block, and afterwards until room is needed for others, the least recently used going first.

        Args:
            prompt: text, token ids or chat messages.

        Raises:
            ValueError: when it is larger than ``prefix_memory``, or than what prefixes in use leave of it, and when it
                leaves no room in the model's context for a prompt that begins with it.
        """
        tokens = self._encode(prompt, "prefix")
        running = None if self._running is None else self._running()
        with ExitStack() as stack:
            # A server computes in a thread of its own, and the model can do one thing at a time.
            quiet: AbstractContextManager[object] = nullcontext()
            if running is not None and not isinstance(running, GenerationStream):
                quiet = running.between_passes
            with quiet:
                kept = stack.enter_context(self.prefixes.hold(tokens, self.drafter.every_feature))
            yield kept

    def _pick_verifier(self, params: SamplingParams) -> Verifier:
        if isinstance(self._verifier, Verifier):
            return create_verifier("greedy") if params.greedy and self._verifier.lossless else self._verifier
        if self._verifier == "greedy" and not params.greedy:
            raise ValueError(f"the greedy verifier needs temperature 0, got {params.temperature}")
        if params.greedy:
            return create_verifier("greedy")
        return create_verifier("coupled" if self._verifier == "auto" else self._verifier)

    def _serving_verifier(self, params: SamplingParams) -> Verifier:
        """The verifier for requests such as this one; a coupled one serves any of them side by side."""
        picked = self._pick_verifier(params)
        if not params.greedy or self._verifier == "greedy":
            return picked
        if isinstance(self._verifier, Verifier):
            return self._verifier if self._verifier.coupled else picked
        return create_verifier("coupled") if self._verifier in ("auto", "coupled") else picked

    def _pick_spare(self, rows: Sequence[Row], policy: TreePolicy, verifier: Verifier) -> int | None:
        """Few slots behind the texts of many rows, where their trees may be cut; None for room for whole ones."""
        vary = not isinstance(policy, FixedTrees) and verifier.siblings == "deterministic"
        return spare_behind(self.drafter, [row.max_len - row.prompt_len for row in rows], vary)

    def _plan_memory(
        self, rows: Sequence[Row], shared: SharedWork | None, joins: bool, spare: int | None = None
    ) -> MemoryPlan:
        """The most this call can have. Raises ValueError where it cannot run."""
        return self._memory.plan(Workload.of(
            [(row.prompt_len, row.max_len) for row in rows], self.drafter,
            sampled=not all(row.params.greedy for row in rows), shared=shared, refers=self.target.refers_to_segments,
            joins=joins, spare=spare,
        ))  # fmt: skip

    def _pick_policy(self, verifier: Verifier, params: SamplingParams) -> TreePolicy:
        if not (self._adaptive and _may_vary(verifier, params)):
            return FixedTrees()
        if self._times is None:
            cautious = CAUTIOUS_CPU if self.target.device.type == "cpu" else CAUTIOUS_GPU
            self._times = PassTimes(load_curve(LatencyKey.of(self.target)) or cautious)
        if self._experience is None:
            self._experience = Experience(self.drafter.expected_accepted(RUNGS))
        foretells = _is_foretold(verifier, params) and not self.drafter.virtual_nodes
        return AdaptiveTrees(self._times, self._experience, self.target.takes_uneven, foretells)

    def _make_rows(self, prompts: Sequence[Prompt], params: SamplingParams, verifier: Verifier) -> list[Row]:
        """Rows with their noise.

        A coupled or greedy text is a function of seed and completion alone. Other policies compare with the noise what
        was drafted, and drafts may stem from other rows and earlier calls: there no noise is ever used twice, so a seed
        repeats a text on a fresh decoder only.
        """
        seed, repeatable = params.seed, verifier.coupled or params.greedy
        if not repeatable and seed is not None:
            seed = derive_seed(seed, self._calls)
        self._calls += 1
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer: pass SpecDecoder(..., tokenizer=...)")
        limit = self.target.max_context
        eos = frozenset() if params.ignore_eos else self.target.eos_token_ids
        rows: list[Row] = []
        for prompt_index, prompt in enumerate(prompts):
            tokens = self._encode(prompt, "prompt")
            longest = len(tokens) + params.max_new_tokens
            for completion in range(params.n):
                noise = PositionNoise(derive_seed(seed, completion if repeatable else len(rows)), self._vocabulary)
                text = None if self.tokenizer is None else TextStream(self.tokenizer, params.stop)
                max_len = longest if limit is None else min(longest, limit)
                rows.append(Row(list(tokens), len(tokens), max_len, params, noise, eos, prompt_index, completion, text))
        return rows

    def _encode(self, prompt: Prompt, what: str) -> list[int]:
        """Tokens of a prompt or prefix; raises ValueError where the model's context has no room for one more."""
        tokens, limit = encode_prompt(prompt, self.tokenizer, self.target.vocab_size), self.target.max_context
        if limit is not None and len(tokens) >= limit:
            raise ValueError(f"the {what} has {len(tokens)} tokens, the model's context only {limit}: shorten it")
        return tokens


def _is_foretold(verifier: Verifier, params: SamplingParams) -> bool:
    """Whether a text does not depend on what is drafted."""
    return params.greedy or (verifier.coupled and verifier.lossless)


def _may_vary(verifier: Verifier, params: SamplingParams) -> bool:
    """Whether a clock may decide what is drafted; not of a text that depends on it and has to be met again."""
    return _is_foretold(verifier, params) or params.seed is None


def merge_params(params: SamplingParams | None, fields: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters with some fields replaced; unknown names raise ValueError with the nearest ones."""
    for name in fields:
        if name not in SamplingParams.names():
            raise ValueError(unknown("sampling parameter", name, SamplingParams.names()))
    return replace(params or SamplingParams(), **fields)

"""What quantizing a target costs and gives: perplexity, agreement with 16 bit, memory, and speed with each drafter.

The text is that of the questions that ship, as chats. Per precision one model is loaded at a time; plain decoding and
the drafters take turns question by question, so that a slow spell of the machine touches all of them.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from specdec.benchmarks import record
from specdec.benchmarks.agreement import AgreementError, compare
from specdec.benchmarks.quant_rows import HEADS, KV_TOKENS, caption, rows
from specdec.benchmarks.questions import Question, QuestionSet
from specdec.benchmarks.schema import PLAIN, SCHEMA
from specdec.decoder import SpecDecoder
from specdec.model_shape import ModelShape
from specdec.prefix import common_prefix
from specdec.prompts import encode_prompt
from specdec.sampling import SamplingParams
from specdec.target import HFTarget

KIND = "quant"
WINDOW = 512
"""Most tokens of a text that are scored."""

Load = Callable[[str], tuple[HFTarget, Any]]
"""From a precision's name to a target and its tokenizer."""


@dataclass(frozen=True)
class DrafterFigures:
    """What a drafter, or plain decoding, reached.

    Attributes:
        tokens_per_s: median over the questions.
        speedup: over plain decoding of the same precision, median over the questions.
        tau: tokens per pass of the target.
        differing: texts that differ from plain decoding's, by rounding.
    """

    tokens_per_s: float
    speedup: float
    tau: float
    differing: int


@dataclass(frozen=True)
class PrecisionFigures:
    """One line of the table.

    Attributes:
        precision: its name.
        perplexity: of the questions' text.
        perplexity_change: over the first precision's, as a share.
        top_agreement: share of positions of that text where the likeliest token is the first precision's.
        text_agreement: share of a greedy answer that comes before the first token that differs, mean over questions.
        weight_bytes: parameters and buffers.
        kv_bytes: a row's KV cache with room for ``KV_TOKENS``.
        scored_tokens: tokens that perplexity and the likeliest ones are over.
        drafters: by label; "none" is plain decoding.
    """

    precision: str
    perplexity: float
    perplexity_change: float
    top_agreement: float
    text_agreement: float
    weight_bytes: int
    kv_bytes: int
    scored_tokens: int
    drafters: dict[str, DrafterFigures] = field(default_factory=dict)


@dataclass(frozen=True)
class _Reference:
    perplexity: float
    choices: list[Tensor]
    answers: list[list[int]]


def run_quant(
    load: Load,
    precisions: Sequence[str],
    drafters: Sequence[str],
    questions: Sequence[Question],
    max_new_tokens: int,
    say: Callable[[str], None] = lambda _: None,
) -> list[PrecisionFigures]:
    """Measure every precision; the first is what the others are compared with.

    Raises:
        AgreementError: where a drafter's text differs from plain decoding's of the same precision by more than rounding
            explains.
    """
    if not precisions or not questions or max_new_tokens < 1:
        raise ValueError("a precision, a question and a new token are needed at least")
    reference: _Reference | None = None
    lines = []
    for precision in precisions:
        say(f"loading {precision}")
        target, tokenizer = load(precision)
        prompts = [
            encode_prompt([{"role": "user", "content": question.turns[0]}], tokenizer, target.vocab_size)
            for question in questions
        ]
        say(f"{precision}: perplexity")
        scored = [_scored(target, prompt[:WINDOW]) for prompt in prompts]
        count = sum(len(choice) for _, choice in scored)
        perplexity = math.exp(-sum(total for total, _ in scored) / count)
        say(f"{precision}: speed")
        answers, figures = _speeds(target, drafters, prompts, questions, max_new_tokens)
        if reference is None:
            reference = _Reference(perplexity, [choice for _, choice in scored], answers)
        same = sum(int((a == b).sum()) for (_, a), b in zip(scored, reference.choices, strict=True))
        shares = [common_prefix(a, b) / len(b) for a, b in zip(answers, reference.answers, strict=True)]
        shape = ModelShape.of(target)
        lines.append(
            PrecisionFigures(
                precision, perplexity, perplexity / reference.perplexity - 1, same / count, fmean(shares),
                shape.weights, shape.kv_bytes(KV_TOKENS), count, figures,
            )
        )  # fmt: skip
        del target
        gc.collect()
    return lines


@torch.inference_mode()
def _scored(target: HFTarget, tokens: Sequence[int]) -> tuple[float, Tensor]:
    """Log-probability of a text after its first token, and the likeliest token ``[len - 1]`` at each position."""
    if len(tokens) < 2:
        raise ValueError(f"a text of {len(tokens)} tokens has no perplexity")
    inputs = torch.tensor([list(tokens)], device=target.device)
    size = inputs.shape[1] - 1
    cache = target.new_cache(1, size)
    step, parts = cache.longest_pass or size, []
    for first in range(0, size, step):
        width = min(step, size - first)
        depth = torch.arange(width, device=target.device).unsqueeze(0)
        causal = torch.ones(1, width, width, dtype=torch.bool, device=target.device).tril()
        parts.append(target.run(inputs[:, first : first + width], None, cache, depth, causal).logits[0].float())
        cache.advance([width])
    logits = torch.cat(parts)
    chosen = logits.log_softmax(-1).gather(1, inputs[0, 1:].unsqueeze(1))
    return float(chosen.double().sum()), logits.argmax(-1).cpu()


def _speeds(
    target: HFTarget,
    drafters: Sequence[str],
    prompts: Sequence[Sequence[int]],
    questions: Sequence[Question],
    max_new_tokens: int,
) -> tuple[list[list[int]], dict[str, DrafterFigures]]:
    """Plain decoding's answers, and figures by drafter."""
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    decoders = {name: SpecDecoder(target, name, keep_prefixes=False) for name in dict.fromkeys([PLAIN, *drafters])}
    for decoder in decoders.values():  # warm up
        decoder.generate(list(prompts[0]), params)
    answers: list[list[int]] = []
    rates: dict[str, list[float]] = {name: [] for name in decoders}
    ratios: dict[str, list[float]] = {name: [] for name in decoders}
    totals = {name: [0, 0, 0] for name in decoders}  # emitted, passes, differing texts
    for prompt, question in zip(prompts, questions, strict=True):
        for name, decoder in decoders.items():
            result = decoder.generate(list(prompt), params)
            stats = result.stats
            if name == PLAIN:
                answers.append(result.token_ids)
            difference = compare(target, question.question_id, prompt, answers[-1], result.token_ids, params)
            if difference is not None and not difference.rounding:
                raise AgreementError(f"drafter {name!r}, question {question.question_id}: {difference}")
            rates[name].append(stats.tokens_per_second)
            ratios[name].append(stats.tokens_per_second / rates[PLAIN][-1])
            totals[name][0] += stats.emitted
            totals[name][1] += stats.passes
            totals[name][2] += difference is not None
    figures = {
        name: DrafterFigures(median(rates[name]), median(ratios[name]), emitted / passes, differing)
        for name, (emitted, passes, differing) in totals.items()
    }
    return answers, figures


def document(
    lines: Sequence[PrecisionFigures],
    settings: dict[str, Any],
    questions: QuestionSet,
    command: Sequence[str],
    device: torch.device,
) -> dict[str, Any]:
    """The result as JSON: what was measured, on what, from which commit."""
    return {
        "schema": SCHEMA, "kind": KIND, "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": list(command), "commit": record.commit(), "machine": record.machine(device),
        "versions": record.versions(), "settings": settings, "questions": questions.to_json(),
        "precisions": [asdict(line) for line in lines],
    }  # fmt: skip


def table(lines: Sequence[PrecisionFigures], num_texts: int) -> str:
    """One line per precision and drafter, in Markdown, and what perplexity is over.

    Args:
        lines: what ``run_quant`` returned.
        num_texts: the questions it was given.
    """
    precisions = [asdict(line) for line in lines]
    cells = [HEADS, tuple("---" for _ in HEADS), *rows(precisions, num_texts)]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in cells), "", caption(precisions)])

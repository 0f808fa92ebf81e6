"""A simulated machine for drafters that work together: costs are numbers, hits are scripted, time is a counter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from unit_rows import make_row

from specdec.adaptive import AdaptiveTrees
from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.latency import LatencyCurve
from specdec.missed import MissedPasses
from specdec.planner import CAUTIOUS_CPU, PassTimes
from specdec.sampling import SamplingParams
from specdec.target import TargetOutput
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict

VOCAB = 5000
PROMPT = 40
COSTS = LatencyCurve.simple({1: 14.8, 4: 17.2, 8: 20.0, 16: 28.4, 32: 48.0, 64: 90.2})
"""A small model in bfloat16 on two cores."""


@dataclass
class Clock:
    """Simulated milliseconds."""

    ms: float = 0.0

    def __call__(self) -> float:
        """Seconds, as ``perf_counter`` gives them."""
        return self.ms / 1000.0


@dataclass(frozen=True)
class Text:
    """What the target says, and how well it can be guessed where.

    Attributes:
        seed: of tokens and guesses.
        repeats: share of stretches of 16 tokens that copy what was there before.
    """

    seed: int
    repeats: float
    length: int = 200

    def token(self, position: int) -> int:
        return random.Random(f"token {self.seed} {position}").randrange(VOCAB)

    def chance(self, kind: str, position: int) -> float:
        """Uniform in [0, 1), the same whenever it is asked for."""
        return random.Random(f"{kind} {self.seed} {position}").random()

    def copies(self, position: int) -> bool:
        return self.chance("stretch", position // 16) < self.repeats


class Copying(Drafter):
    """Cheap; right for long where the text copies, elsewhere silent or mostly wrong."""

    name = "copying"

    def __init__(self, clock: Clock, texts: dict[int, Text], ms: float = 0.2) -> None:
        self.clock, self.texts, self.ms = clock, texts, ms
        self.asked = 0

    def propose(self, batch: Batch) -> TokenTree:
        self.clock.ms += self.ms
        self.asked += 1
        text, at = self.texts[batch.rows[0].row_id], len(batch.rows[0].tokens)
        if text.copies(at):
            path = [(text.token(at + i), 0.9) if text.chance("slip", at + i) < 0.9 else (1, 0.9) for i in range(8)]
        elif text.chance("match", at) < 0.4:
            path = [(text.token(at), 0.4) if text.chance("luck", at) < 0.2 else (1, 0.4), (2, 0.4)]
        else:
            path = []
        tokens, parents, sure = [batch.rows[0].pending], [-1], [1.0]
        for place, (token, chance) in enumerate(path):
            tokens, parents, sure = [*tokens, token], [*parents, place], [*sure, sure[-1] * chance]
        return TokenTree(torch.tensor([tokens]), torch.tensor([parents]), confidence=torch.tensor([sure]))


class Reading(Drafter):
    """Dear: a pass per level, and every token's state to be read, in batches for little more than alone.

    Args:
        level_ms: of drafting one level.
        read_ms: of reading states, however many; a hundredth of it more for each.
        skill: scales how often it is right.
    """

    name = "reading"
    features = ("last",)
    reads_logits = False

    def __init__(
        self, clock: Clock, texts: dict[int, Text], level_ms: float = 1.2, read_ms: float = 1.0, skill: float = 1.0
    ) -> None:
        self.clock, self.texts, self.level_ms, self.read_ms, self.skill = clock, texts, level_ms, read_ms, skill
        self.asked = self.reads = 0
        self.read: list[float] = []
        self.spent = 0.0

    def _take(self, ms: float) -> None:
        self.clock.ms += ms
        self.spent += ms

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        assert output is not None
        self.read = output.features["last"][0, :, 0].tolist()
        self._take(self.read_ms * (1 + 0.01 * len(self.read)))

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        path = verdict.path[0, : verdict.num_accepted[0] + 1]
        self.read += output.features["last"][0, path, 0].tolist()
        self.reads += 1
        self._take(self.read_ms * (1 + 0.01 * len(path)))

    def propose(self, batch: Batch) -> TokenTree:
        row = batch.rows[0]
        assert self.read == [float(token) for token in row.tokens[:-1]], "every committed token's state, in order, once"
        self.asked += 1
        text, at = self.texts[row.row_id], len(row.tokens)
        tokens, parents, sure, above = [row.pending], [-1], [1.0], 0
        for level in range(5):
            self._take(self.level_ms)
            kind = text.chance("kind", at + level)
            chance = self.skill * (0.9 if kind < 0.35 else 0.4 if kind < 0.7 else 0.1)
            right = text.chance("guess", at + level) < chance
            for rank, share in enumerate((chance, 0.3 * (1 - chance), 0.1 * (1 - chance))):
                hit = right if rank == 0 else rank == 1 and not right and text.chance("second", at + level) < 0.3
                tokens.append(text.token(at + level) if hit else 10 + level * 3 + rank)
                parents.append(above)
                sure.append(sure[above] * share)
            above = len(tokens) - 3
        order = [0, *sorted(range(1, len(tokens)), key=lambda node: -sure[node])]
        place = {node: column for column, node in enumerate(order)}
        return TokenTree(
            torch.tensor([[tokens[node] for node in order]]),
            torch.tensor([[-1 if node == 0 else place[parents[node]] for node in order]]),
            confidence=torch.tensor([[sure[node] for node in order]]),
        ).first(batch.max_nodes)


@dataclass
class Run:
    """What came of it."""

    tokens: int = 0
    ms: float = 0.0
    passes: int = 0
    nodes: int = 0

    @property
    def speedup(self) -> float:
        """Over plain decoding on the same machine."""
        return self.tokens * COSTS.at(1) / self.ms


def decode(
    drafter: Drafter, clock: Clock, texts: dict[int, Text], wanted: Sequence[Text], adaptive: bool = True
) -> Run:
    """One text after another as ``Generation`` decodes them; the prompts' time is not counted."""
    found, times = Run(), PassTimes(CAUTIOUS_CPU)
    drafter.bind(_Target(), None)
    for text in wanted:
        rows = [
            make_row([text.token(i) for i in range(PROMPT)], VOCAB, SamplingParams(), 0, max_new_tokens=text.length)
        ]
        batch, policy, missed = Batch(rows, VOCAB), AdaptiveTrees(times), MissedPasses()
        texts[rows[0].row_id] = text
        drafter.start(batch, _output(torch.tensor([rows[0].tokens[:-1]])))
        began = clock.ms
        while len(rows[0].tokens) < rows[0].max_len:
            budget = policy.budget(rows) if adaptive else 24
            start, tree = clock.ms, TokenTree.from_pending(batch.pending)
            if budget > 1:
                batch.max_nodes = batch.mean_nodes = budget
                batch.trying = adaptive and policy.trying
                missed.hand_over(lambda *seen, batch=batch: drafter.observe(batch, *seen))
                tree = drafter.propose(batch).limit_depth(batch.max_depth).first(budget)
            drafting = clock.ms - start
            clock.ms += COSTS.at(tree.num_nodes)
            verdict, output = _verdict(tree, text, len(rows[0].tokens)), _output(tree.tokens)
            start = clock.ms
            if budget > 1:
                drafter.observe(batch, tree, output, verdict)
            else:
                missed.add(tree, output, verdict)
                if missed.full:
                    missed.hand_over(lambda *seen, batch=batch: drafter.observe(batch, *seen))
            drafting += clock.ms - start
            rows[0].tokens += verdict.tokens[0]
            times_ms = {"draft": drafting, "target": COSTS.at(tree.num_nodes)}
            policy.observe(rows, tree, verdict, times_ms)
            found.passes, found.nodes = found.passes + 1, found.nodes + tree.num_nodes
        found.tokens, found.ms = found.tokens + len(rows[0].tokens) - PROMPT, found.ms + clock.ms - began
        drafter.stop()
    return found


def _output(tokens: torch.Tensor) -> TargetOutput:
    return TargetOutput(torch.zeros(*tokens.shape, 1), {"last": tokens.unsqueeze(-1).float()})


def _verdict(tree: TokenTree, text: Text, at: int) -> Verdict:
    path, parents, tokens = [0], tree.parents[0].tolist(), tree.tokens[0].tolist()
    while True:
        wanted = text.token(at + len(path) - 1)
        child = [c for c, above in enumerate(parents) if above == path[-1] and tokens[c] == wanted]
        if not child:
            emitted = [text.token(at + i) for i in range(len(path))]
            return Verdict(torch.tensor([path]), [len(path) - 1], [emitted], [False])
        path.append(child[0])


class _Target:
    """What drafters here need to know of one."""

    vocab_size = VOCAB
    takes_uneven = True
    device: Any = torch.device("cpu")

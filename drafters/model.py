"""A small model drafts: a dynamic tree by confidence, its own KV cache, and a catch-up before every draft."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.drafters.compiled import CompiledDrafter, compile_model
from specdec.drafters.growth import grow, rank
from specdec.drafters.heads import MOST_PLANNED, latest
from specdec.drafters.model_prompts import DraftPrompts, Lookahead
from specdec.drafters.pruned import NAME, build_pruned, read_pruned, ships_any
from specdec.drafters.weights import DrafterWeights, TargetFacts, find_pretrained
from specdec.kernels.decoder_layer import MOST_TOP
from specdec.kv_cache import KVCache
from specdec.latency import LatencyKey, load_curve
from specdec.models import find_device, find_dtype
from specdec.optimal_tree import OptimalTrees
from specdec.placement import USUAL_CHANCES, DraftNodes, by_levels, chances_by_depth, measure_link, plan_draft
from specdec.policy import NO_LIMIT
from specdec.sampling import filter_logits
from specdec.target import PREFILL_CHUNK, HFTarget, TargetOutput
from specdec.tree import PADDING, ROOT, TokenTree

USUAL_DEPTH = 5
"""Of trees, where nothing is known of what passes cost."""


@dataclass(frozen=True)
class ModelConfig:
    """Options of the model drafter.

    Attributes:
        model: alias, folder or hub id of the draft model, or a folder that ``specdec train model`` wrote; "" is what
            ships for the target, or the loaded one that is passed to the drafter.
        depth: passes of the draft model per step, depth of the tree; 0 chooses what pays, 5 at most, by the profiles of
            both models, the way between their devices and the draft model's hit rates, and is 5, with a warning, where
            ``specdec profile`` has not measured both.
        beams: nodes expanded per depth, and children per node.
        max_nodes: most nodes of a tree, root included; with ``depth`` 0 fixed trees have as many of them as pay.
        dtype: weights' dtype when loading; of a draft model made to order, beside its target, it is the target's.
        device: where the draft model runs, whatever the target's device; "auto" is the target's for a draft model made
            to order, CUDA where there is one for others.
        allow_pickle: load pickled weights, which can execute code.
        trust_remote_code: run modelling code that comes with the weights.
        prompt_tokens: folder of PPD weights trained for the draft model; with k prompt tokens each of its passes drafts
            k + 1 levels. Policies that want drawn children do without.
    """

    model: str = ""
    depth: int = USUAL_DEPTH
    beams: int = 4
    max_nodes: int = 24
    dtype: str = "auto"
    device: str = "auto"
    allow_pickle: bool = False
    trust_remote_code: bool = False
    prompt_tokens: str = ""

    def __post_init__(self) -> None:
        for name, least in (("depth", 0), ("beams", 1), ("max_nodes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


class ModelDrafter(Drafter):
    """Any causal language model with the target's vocabulary.

    Where the policy ranks candidates, the tree is EAGLE-2's (Li et al. 2024, section 4): at each depth the best beams
    by joint draft probability are expanded, and the best nodes overall are kept. Where the policy compares
    probabilities, children are drawn from the draft distribution and the tree's shape is fixed: ``beams`` children of
    the root, one chain under each, since choosing among drawn nodes would bias the text.

    Args:
        config: options.
        model: a loaded transformers model, instead of ``config.model``.
        tokenizer: its tokenizer, to compare vocabularies.
    """

    name = "model"
    Config = ModelConfig

    def __init__(
        self, config: ModelConfig | None = None, model: Any | None = None, tokenizer: Any | None = None
    ) -> None:
        self.config = config or ModelConfig()
        self.depth = self.config.depth or USUAL_DEPTH
        self.nodes = self.config.max_nodes  # of a tree whose size nobody else decides
        self._source = self.config.model
        self._expected: list[float] = []  # accepted nodes of the best tree of each size, once they are asked for
        self._tokenizer = tokenizer
        self._cache: KVCache | None = None
        self._prompts: DraftPrompts | None = None
        self._compiled: CompiledDrafter | None = None
        self._pruned = None if model is not None else read_pruned(self.config.model)
        self._shipped = model is None and not self.config.model and ships_any()
        if self._pruned is not None or self._shipped:
            find_device(self.config.device)  # a mistake shows at once
            return  # shares parts of the target, which ``bind`` brings
        if model is None:
            if not self.config.model:
                raise self._missing()
            from specdec.models import load_model

            loaded = load_model(
                self.config.model,
                dtype=self.config.dtype,
                device=self.config.device,
                allow_pickle=self.config.allow_pickle,
                trust_remote_code=self.config.trust_remote_code,
                packed=True,
            )
            model, self._tokenizer = loaded.model, loaded.tokenizer
        self._draft_with(model)

    def _draft_with(self, model: Any) -> None:
        """Take a transformers model for drafting."""
        self.draft_model = self._wrap(model)
        if self.config.prompt_tokens:
            self._prompts = DraftPrompts(Path(self.config.prompt_tokens).expanduser(), self.draft_model)
        elif type(self.draft_model) is HFTarget:
            self._compiled = compile_model(model)

    def _missing(self) -> ValueError:
        return ValueError(
            f"drafter {self.name!r} needs a draft model: -o model=NAME, or {type(self).__name__}(model=...); "
            "`specdec train model` makes one"
        )

    def _wrap(self, model: Any) -> HFTarget:
        """What runs a draft model."""
        return HFTarget(model)

    def weights_folder(self, target: TargetFacts) -> Path | None:
        if not self._shipped:
            return None if self._pruned is None else Path(self.config.model).expanduser()
        folder = find_pretrained(NAME, target)
        if folder is None:
            raise self._missing()
        return folder

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        if self._shipped:
            self._source = str(self.weights_folder(TargetFacts.of(target)))
            self._pruned = read_pruned(self._source)
        if self._pruned is not None:
            device = target.device if self.config.device == "auto" else find_device(self.config.device)
            dtype = find_dtype(self.config.dtype)  # a mistake shows on any device
            if device == target.device or not isinstance(dtype, torch.dtype):
                dtype = target.dtype  # whose embeddings and output head it shares
            self._draft_with(build_pruned(self._pruned, target, device, dtype))
        if self.draft_model.vocab_size != target.vocab_size:
            raise ValueError(
                f"the draft model has a vocabulary of {self.draft_model.vocab_size}, the target of "
                f"{target.vocab_size}: they must be the same"
            )
        if tokenizer is not None and self._tokenizer is not None:
            mine, theirs = self._tokenizer.get_vocab(), tokenizer.get_vocab()
            if mine != theirs:
                word = next(w for w in sorted(mine.keys() | theirs.keys()) if mine.get(w) != theirs.get(w))
                raise ValueError(
                    f"draft and target tokenizers differ: {word!r} is {mine.get(word)} for the draft model and "
                    f"{theirs.get(word)} for the target"
                )
        if self.config.depth == 0:
            self._plan(target)

    def _plan(self, target: HFTarget) -> None:
        """Draft as deep, and in fixed trees as many nodes, as pays by what passes of both models are known to take."""
        self.depth, self.nodes, self._expected = USUAL_DEPTH, self.config.max_nodes, []
        models = [(target, "TARGET"), (self.draft_model, self._source or "DRAFT")]
        whole, draft = curves = [load_curve(LatencyKey.of(model)) for model, _ in models]
        if whole is None or draft is None:
            lacking = [_profile_command(*each) for each, curve in zip(models, curves, strict=True) if curve is None]
            warnings.warn(
                f"drafter {self.name!r} with depth=0 goes by profiles that are not there, so it drafts {USUAL_DEPTH} "
                f"levels: run {' and '.join(lacking)}, with the target's --quantize where it has one, and TARGET with "
                "its --kv",
                RuntimeWarning,
                stacklevel=4,
            )
            return
        beams, most = self.config.beams, min(self.config.max_nodes, MOST_PLANNED)
        rates = _known_rates(self._pruned)
        plan = plan_draft(
            whole, draft, measure_link(target.device, self.draft_model.device), draft_nodes=self._draft_nodes,
            chances=chances_by_depth(rates, beams, USUAL_DEPTH) if rates else USUAL_CHANCES[:beams],
            max_nodes=most, max_depth=USUAL_DEPTH,
        )  # fmt: skip
        self.depth = max(1, plan.depth)  # where nothing pays, the planner decides whether to ask for it
        if plan.depth:
            self.nodes = plan.nodes

    @property
    def _draft_nodes(self) -> DraftNodes:
        """Of the draft model's passes."""
        if self._prompts is not None:
            return self._prompts.draft_nodes(self.config.beams)
        again = 1 if self._compiled is None else 0  # the pending token, which stays a tree's root
        return by_levels(self.config.beams, again)

    def _most_nodes(self, batch: Batch) -> int:
        """Nodes of a tree, root included: what was planned, but where somebody sets sizes while decoding."""
        return self.nodes if batch.mean_nodes >= NO_LIMIT else self.config.max_nodes

    def expected_accepted(self, sizes: Sequence[int]) -> list[float] | None:
        rates = self._pruned.hit_rates if self._pruned is not None else ()
        if not rates or self._prompts is not None:  # which are right less often than the model's own passes
            return None
        if not self._expected:
            chances, most = chances_by_depth(rates, self.config.beams, self.depth), self.config.max_nodes
            trees = OptimalTrees(chances, min(most, MOST_PLANNED), self.depth)
            self._expected = [trees.best(size, self.depth).tokens - 1.0 for size in range(1, trees.max_nodes + 1)]
        return [self._expected[min(size, len(self._expected)) - 1] for size in sizes]

    def start(self, batch: Batch, output: TargetOutput | None) -> None:
        self._cache = self.draft_model.new_cache(len(batch), max(len(row.tokens) for row in batch.rows) + 64)

    def propose(self, batch: Batch) -> TokenTree:
        depth = min(self.depth, max(row.max_depth for row in batch.rows))
        if self.draft_model.max_context is not None:
            longest = max(len(row.tokens) for row in batch.rows)
            depth = min(depth, self.draft_model.max_context - longest)
        if depth < 1 or self._most_nodes(batch) < 2:
            return TokenTree.from_pending(batch.pending)
        if batch.siblings == "deterministic":
            return self._ranked(batch, depth)
        return self._drawn(batch, self._catch_up(batch), depth)

    def keep(self, batch: Batch, rows: Sequence[int]) -> None:
        if self._cache is not None and rows:
            self._cache.keep_rows(rows)

    def join(self, batch: Batch, count: int, output: TargetOutput | None = None) -> None:
        if self._cache is not None:
            self._cache.add_rows(count)

    def stop(self) -> None:
        self._cache = None

    def _catch_up(self, batch: Batch) -> Tensor:
        """Feed every token not seen yet; ``[B, V]`` logits after the pending one, which stays the tree's root."""
        assert self._cache is not None
        logits = self.draft_model.extend(self._missing_tokens(batch), self._cache).logits[:, 0]
        self._cache.truncate([len(row.tokens) - 1 for row in batch.rows])
        return logits

    def _forward(self, tree: TokenTree, first_node: int) -> Tensor:
        """Logits ``[B, n, V]`` of the tree's nodes from ``first_node`` on."""
        assert self._cache is not None
        self._cache.make_room(tree.num_nodes)
        return self.draft_model.forward(tree, self._cache, first_node=first_node).logits

    def _seen(self, batch: Batch, tree: TokenTree, nodes: Tensor) -> Tensor | None:
        """``[B, n, V]`` tokens of each node's context, for the repetition penalty."""
        if batch.seen is None:
            return None
        return tree.seen_on_paths(batch.seen.to(tree.tokens.device), nodes)

    def _ranked(self, batch: Batch, depth: int) -> TokenTree:
        """The best nodes by joint confidence."""
        beams, most = self.config.beams, min(self._most_nodes(batch), batch.max_nodes)
        if self._compiled is not None and batch.ranks_logits and beams <= MOST_TOP:
            assert self._cache is not None
            if self._cache.regular:
                start = self._enter(batch, self._compiled, self._cache)
                sizes = (depth, beams, beams, most, batch.total_nodes(most))
                return self._compiled.grow(self._cache, batch.pending, start, sizes)
        level_logits = self._levels(batch)

        def expand(tree: TokenTree, first: int, level: int) -> tuple[Tensor, Tensor]:
            return rank(batch, level_logits(tree, first, level), beams, tree, first, level)

        return grow(batch.pending.to(self.draft_model.device), depth, beams, most, expand)

    def _missing_tokens(self, batch: Batch) -> list[list[int]]:
        """Tokens that the cache does not hold, the pending one among them in any case."""
        assert self._cache is not None
        known = [min(each, len(row.tokens) - 1) for each, row in zip(self._cache.row_lengths, batch.rows, strict=True)]
        if known != self._cache.row_lengths:
            self._cache.truncate(known)
        return [row.tokens[length:] for row, length in zip(batch.rows, known, strict=True)]

    def _enter(self, batch: Batch, compiled: CompiledDrafter, cache: KVCache) -> Tensor:
        """Feed every token not seen yet, the pending one included; ``[B, d]`` the states there."""
        missing = self._missing_tokens(batch)
        found = compiled.embeddings.new_empty(len(batch), compiled.embeddings.shape[1])  # each row misses one at least
        for first in range(0, max(map(len, missing)), PREFILL_CHUNK):
            part = [tokens[first : first + PREFILL_CHUNK] for tokens in missing]
            width = max(map(len, part))
            states = compiled.enter(cache, torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in part]))
            counts = [len(tokens) for tokens in part]
            cache.advance(counts)
            found = latest(states, counts, found)
        return found

    def _levels(self, batch: Batch) -> Callable[[TokenTree, int, int], Tensor]:
        """Says, after catching up, the logits ``[B, n, V]`` for a level's nodes, from those of the one above."""
        assert self._cache is not None
        if self._prompts is not None:
            first_logits = self._prompts.catch_up(batch, self._cache)
            return Lookahead(self._prompts, self.draft_model, self._cache, first_logits).logits
        logits = self._catch_up(batch).unsqueeze(1)
        return lambda tree, first, level: logits if level == 1 else self._forward(tree, first)

    def _drawn(self, batch: Batch, logits: Tensor, depth: int) -> TokenTree:
        """Children drawn from the draft distribution, with the distributions they were drawn from."""
        device, size = self.draft_model.device, len(batch)
        budget = self._most_nodes(batch) - 1
        width = max(1, min(self.config.beams, budget // depth, logits.shape[-1]))
        depth = min(depth, budget // width)
        tokens, parents = [batch.pending.to(device).unsqueeze(1)], [torch.full((size, 1), ROOT, device=device)]
        tree = TokenTree(tokens[0], parents[0])
        log_q: list[Tensor] = []
        logits = logits.unsqueeze(1)
        nodes = torch.zeros(1, dtype=torch.int64, device=device)
        for level in range(1, depth + 1):
            seen = self._seen(batch, tree, nodes)
            scores = filter_logits(logits.flatten(0, 1), batch.params, None if seen is None else seen.flatten(0, 1))
            q = scores.view(size, len(nodes), -1).log_softmax(-1)
            log_q.append(q)
            drawn = self._draw(batch, q, level, width if level == 1 else 1)  # [B, n, children]
            impossible = q.gather(2, drawn).isneginf().flatten(1)
            parent = nodes.repeat_interleave(drawn.shape[2]).expand(size, -1)
            orphaned = parents[-1].eq(PADDING) if level > 1 else torch.zeros_like(impossible)
            tokens.append(drawn.flatten(1))
            parents.append(parent.masked_fill(impossible | orphaned, PADDING))
            first = tree.num_nodes
            tree = TokenTree(torch.cat(tokens, dim=1), torch.cat(parents, dim=1))
            nodes = torch.arange(first, tree.num_nodes, device=device)
            if level < depth:
                logits = self._forward(tree, first)
        inner = torch.cat(log_q, dim=1)
        leaves = inner.new_full((size, tree.num_nodes - inner.shape[1], inner.shape[2]), -torch.inf)
        return TokenTree(
            tree.tokens,
            tree.parents,
            draft_log_probs=torch.cat([inner, leaves], dim=1),
            siblings=batch.siblings,
        )

    def _draw(self, batch: Batch, log_q: Tensor, level: int, children: int) -> Tensor:
        """``[B, n, children]`` tokens from ``log_q`` ``[B, n, V]``: Gumbel top-k, or one argmax per child."""
        drawn = []
        for index, row in enumerate(batch.rows):
            position = len(row.tokens) + level - 1
            per_node = []
            for node in range(log_q.shape[1]):
                draws = children if batch.siblings == "with_replacement" else 1
                noise = [
                    row.noise.draft_gumbel(position, node * children + draw).to(log_q.device) for draw in range(draws)
                ]
                keyed = log_q[index, node] + torch.stack(noise)  # [draws, V]
                per_node.append(keyed.argmax(-1) if draws == children else keyed[0].topk(children).indices)
            drawn.append(torch.stack(per_node))
        return torch.stack(drawn)


def _known_rates(weights: DrafterWeights | None) -> Sequence[Sequence[float]]:
    """``[D][R]`` hit rates that lie with a draft model's weights, calibrated or of its training; none else."""
    if weights is None:
        return ()
    held_out: Mapping[str, Any] = weights.facts.get("held_out") or {}
    return weights.hit_rates or held_out.get("hit_rates") or ()


def _profile_command(model: HFTarget, name: str) -> str:
    """What measures a model as it runs here."""
    dtype, device = str(model.dtype).removeprefix("torch."), model.device
    threads = f" --threads {torch.get_num_threads()}" if device.type == "cpu" else ""
    return f"`specdec profile -m {shlex.quote(name)} --dtype {dtype} --device {device}{threads}`"

"""The target model: any decoder-only transformers model, run over token trees with our attention and KV cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from specdec.architecture import check_logits, check_model, check_pass, find_eos_token_ids, find_max_context
from specdec.attention import AttentionPass, AttentionSwitch, JoinedPass
from specdec.kv_cache import KVCache
from specdec.kv_quantized import QuantizedKVCache
from specdec.lean import MOST_NODES, rows_are_independent
from specdec.lean_stack import LeanStack, is_stack_and_head
from specdec.tree import TokenTree

Feature = str | int
"""A hidden state a drafter asks for: ``"last"`` (what the output head reads), ``"pre_norm"`` (before the final norm),
or an integer k, the state after k layers (0 is the embeddings), as in transformers' ``hidden_states[k]``."""

PREFILL_CHUNK = 512
"""Tokens of a prompt computed in one pass."""

_PROBED = 2
"""Tokens that a model is tried with: for more, PyTorch's products make a copy of the weights."""


@dataclass
class TargetOutput:
    """What a pass returns.

    Attributes:
        logits: ``[B, N, V]`` at the nodes of a tree pass; ``[B, 1, V]`` after ``extend``, each row's last token.
        features: name -> ``[B, N, d]`` hidden states of the computed nodes.
    """

    logits: Tensor
    features: dict[Feature, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Chunk:
    """Tokens of a text to be computed in somebody else's pass.

    Attributes:
        tokens: token ids, one or more.
        cache: of one row; they are appended to it and committed.
        states: by name, the hidden states wanted of them, ``[n, d]`` appended to each list.
    """

    tokens: Sequence[int]
    cache: KVCache
    states: Mapping[Feature, list[Tensor]] = field(default_factory=dict)


class HFTarget:
    """A transformers causal language model that checks token trees.

    The model's own modules run unchanged; only the attention function is swapped, and only while a pass runs.

    Args:
        model: a decoder-only model that uses transformers' attention interface.

    Raises:
        ValueError: when the model cannot be served, with the reason.
    """

    kv_bits: int | None = None
    """Of a number in caches that ``new_cache`` makes (``specdec.kv_quantized``); None is the dtype's."""
    quantizes_kv = True
    """Whether ``new_cache`` heeds that."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        check_model(model)
        model.eval()
        self._switch = AttentionSwitch(model)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._check_layers()

    @property
    def device(self) -> torch.device:
        """Where inputs go and outputs come from."""
        device: torch.device = self.model.get_input_embeddings().weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        dtype: torch.dtype = self.model.get_input_embeddings().weight.dtype  # the model's own looks at every parameter
        return dtype if dtype.is_floating_point else self.model.dtype

    @property
    def invariant(self) -> bool:
        """Whether a row of a pass is the same to the bit whatever rides along, so that texts are equal with speculation
        and without, in any batch. Elsewhere rounding may decide near-ties otherwise: rarely in float32, often in 16
        bit."""
        return rows_are_independent(self.model)

    @property
    def vocab_size(self) -> int:
        """Width of the logits, V."""
        return int(self.config.vocab_size)

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return int(self.config.num_hidden_layers)

    @property
    def max_context(self) -> int | None:
        """Most positions the model has, None where it sets no limit."""
        return find_max_context(self.config)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The model's own end-of-sequence ids, from its generation settings and configuration."""
        return find_eos_token_ids(self.model, self.config)

    @property
    def waits_after_phases(self) -> bool:
        """Whether each phase of a step waits for its device, so that its time is its own."""
        return self.device.type == "cuda"

    @property
    def refers_to_segments(self) -> bool:
        """Whether rows of ``new_cache``'s caches refer to what they share; else they copy it."""
        return self.kv_bits is None

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache for this model; capacity counts committed tokens plus the largest tree."""
        if self.kv_bits is not None:
            return QuantizedKVCache(self.kv_bits, batch_size, capacity, self.device)
        return KVCache(batch_size, capacity, self.device)

    def extend(self, rows: Sequence[Sequence[int]], cache: KVCache, features: Sequence[Feature] = ()) -> TargetOutput:
        """Append certain tokens to the cache, in chunks, and commit them: prefill, or a drafter's catch-up.

        Args:
            rows: token ids to append to each row; rows may differ in length, some may be empty.
            cache: extended in place; grows where it is too small.
            features: hidden states to return for all appended tokens, ``[B, longest, d]``, padded at the end.

        Returns:
            Logits ``[B, 1, V]`` after each row's last token, NaN for rows without one.
        """
        longest = max((len(row) for row in rows), default=0)
        if longest == 0:
            raise ValueError("no row has a token to append")
        logits: list[Tensor | None] = [None] * len(rows)
        collected: dict[Feature, list[Tensor]] = {name: [] for name in features}
        step = min(PREFILL_CHUNK, cache.longest_pass or PREFILL_CHUNK)
        for start in range(0, longest, step):
            chunk = [list(row[start : start + step]) for row in rows]
            out = self._extend_by(chunk, cache, features)
            cache.advance([len(part) for part in chunk])
            ends = iter(out.logits[0])
            logits = [next(ends) if part else before for part, before in zip(chunk, logits, strict=True)]
            for name in features:
                collected[name].append(out.features[name])
        filler = torch.full_like(next(row for row in logits if row is not None), torch.nan)
        stacked = torch.stack([filler if row is None else row for row in logits]).unsqueeze(1)
        return TargetOutput(stacked, {name: torch.cat(parts, dim=1) for name, parts in collected.items()})

    def _extend_by(
        self, chunk: Sequence[Sequence[int]], cache: KVCache, features: Sequence[Feature] = ()
    ) -> TargetOutput:
        """A pass over some tokens of each row, maybe none; nothing is committed.

        Returns:
            Logits ``[1, R, V]`` after the last token of each of the R rows that have one; features are padded.
        """
        counts, width = [len(part) for part in chunk], max(map(len, chunk))
        cache.make_room(width)
        depth = torch.arange(width, device=self.device).expand(len(chunk), -1)
        causal = torch.ones(width, width, dtype=torch.bool, device=self.device).tril().expand(len(chunk), -1, -1)
        if min(counts) < width <= MOST_NODES and self.takes_uneven and cache.regular:  # no time is lost on padding
            now = AttentionPass(cache, depth, causal, counts)
            tokens = torch.tensor([[token for part in chunk for token in part]])
            ends = [end - 1 for count, end in zip(counts, accumulate(counts), strict=True) if count]
            out = self._run(now, tokens, None, features, ends)
            return TargetOutput(out.logits, {name: now.padded(states) for name, states in out.features.items()})
        tokens = torch.tensor([[*part, *[0] * (width - len(part))] for part in chunk], device=self.device)
        wanted = sorted({count - 1 for count in counts if count})
        out = self.run(tokens, None, cache, depth, causal, features, wanted)
        found = [out.logits[row, wanted.index(count - 1)] for row, count in enumerate(counts) if count]
        return TargetOutput(torch.stack(found).unsqueeze(0), out.features)

    def forward(
        self, tree: TokenTree, cache: KVCache, features: Sequence[Feature] = (), first_node: int = 0
    ) -> TargetOutput:
        """One pass over the nodes of a tree; nothing is committed.

        Args:
            tree: the tree; its root stands at each row's position ``length``.
            cache: gets the nodes' keys and values behind the committed tokens.
            features: hidden states to return, ``[B, N - first_node, d]``.
            first_node: columns before it were computed by earlier passes over a smaller version of the same tree.

        Returns:
            Logits ``[B, N - first_node, V]``.
        """
        virtual = None
        if tree.virtual is not None and tree.embeddings is not None:
            virtual = (tree.virtual[:, first_node:], tree.embeddings[:, first_node:])
        ancestors = tree.ancestors[:, first_node:]
        if first_node == 0 and virtual is None and tree.batch_size > 1 and self.takes_uneven and cache.regular:
            sizes = tree.row_sizes if tree.num_nodes <= MOST_NODES else None
            if sizes is not None:  # what pads the rows is left out
                now = AttentionPass(cache, tree.depth, ancestors, sizes)
                out = self._run(now, tree.tokens.flatten()[now.places].unsqueeze(0), None, features, None)
                spread = {name: now.spread(states) for name, states in out.features.items()}
                there = len(out.logits) == tree.batch_size  # where the output head wrote them itself
                return TargetOutput(out.logits if there else now.spread(out.logits), spread)
        return self.run(tree.tokens[:, first_node:], virtual, cache, tree.depth, ancestors, features)

    @property
    def takes_uneven(self) -> bool:
        """Whether ``forward`` and ``extend`` compute the nodes that rows have alone, where they differ in number; else
        as many of each as the largest has. Passes in which prompts ride along always do.
        """
        compiled = self._compiled
        return self.kv_bits is None and compiled is not None and compiled.compiles

    @property
    def _compiled(self) -> LeanStack | None:
        """The model's decoder layers where they run as one."""
        forward = getattr(self.model.base_model, "forward", None)
        return forward if isinstance(forward, LeanStack) else None

    def forward_beside(
        self, tree: TokenTree, cache: KVCache, chunks: Sequence[Chunk], features: Sequence[Feature] = ()
    ) -> TargetOutput:
        """``forward`` in one pass with chunks of other texts: decoding rows wait for no prompt (SARATHI, Agrawal et al.
        2023).

        Args:
            tree: as ``forward`` takes it.
            cache: the rows'.
            chunks: each is committed to its own cache.
            features: hidden states to return, of the tree's nodes.
        """
        if not chunks:
            return self.forward(tree, cache, features)
        parts = [self._new_pass(cache, tree.depth, tree.ancestors), *map(self._chunk_pass, chunks)]
        beside = torch.tensor([[token for chunk in chunks for token in chunk.tokens]], device=self.device)
        nodes = tree.tokens.numel()
        virtual = None
        if tree.virtual is not None and tree.embeddings is not None:
            none, nothing = torch.zeros_like(beside, dtype=torch.bool), tree.embeddings.new_zeros(1, beside.numel(), 1)
            embeddings = tree.embeddings.flatten(0, 1).unsqueeze(0)
            virtual = (
                torch.cat([tree.virtual.view(1, -1), none], dim=1),
                torch.cat([embeddings, nothing.expand(-1, -1, embeddings.shape[-1])], dim=1),
            )
        tokens, joined = torch.cat([tree.tokens.reshape(1, -1), beside], dim=1), JoinedPass(parts)
        out = self._run(joined, tokens, virtual, _wanted(chunks, features), list(range(nodes)))
        self._commit(chunks, out, nodes)
        shape = tree.tokens.shape
        # Copies: who keeps them would keep the prompts' too.
        features_of = {name: out.features[name][0, :nodes].clone().view(*shape, -1) for name in features}
        return TargetOutput(out.logits[0].view(*shape, -1), features_of)

    def extend_all(self, chunks: Sequence[Chunk]) -> None:
        """Compute chunks of several texts in one pass."""
        tokens = torch.tensor([[token for chunk in chunks for token in chunk.tokens]], device=self.device)
        out = self._run(JoinedPass([*map(self._chunk_pass, chunks)]), tokens, None, _wanted(chunks), [0])
        self._commit(chunks, out, 0)

    def _chunk_pass(self, chunk: Chunk) -> AttentionPass:
        count = len(chunk.tokens)
        chunk.cache.make_room(count)
        causal = torch.ones(1, count, count, dtype=torch.bool, device=self.device).tril()
        return self._new_pass(chunk.cache, torch.arange(count, device=self.device).unsqueeze(0), causal)

    @staticmethod
    def _commit(chunks: Sequence[Chunk], out: TargetOutput, start: int) -> None:
        """Commit chunks that stand side by side from column ``start`` on, and hand out their hidden states."""
        for chunk in chunks:
            end = start + len(chunk.tokens)
            chunk.cache.advance([len(chunk.tokens)])
            for name, states in chunk.states.items():
                states.append(out.features[name][0, start:end].clone())  # a view would keep the whole pass
            start = end

    def run(
        self,
        tokens: Tensor,
        virtual: tuple[Tensor, Tensor] | None,
        cache: KVCache,
        depth: Tensor,
        ancestors: Tensor,
        features: Sequence[Feature] = (),
        logits_at: list[int] | None = None,
    ) -> TargetOutput:
        """One pass over nodes of which the caller says what they see; nothing is committed.

        Gradients reach what they are wanted for, virtual nodes' embeddings for one.

        Args:
            tokens: ``[B, n]`` int64.
            virtual: ``[B, n]`` bool, nodes that carry an embedding instead, and the embeddings ``[B, n, d]``.
            cache: gets the nodes' keys and values behind what is there.
            depth: ``[B, M]`` int64 distance from each row's first free position, of the M - n nodes written behind the
                committed tokens by earlier passes and of these.
            ancestors: ``[B, n, M]`` bool, which of the M nodes each sees; committed tokens are seen by all.
            features: hidden states to return.
            logits_at: nodes to return logits at; all where None.
        """
        return self._run(self._new_pass(cache, depth, ancestors), tokens, virtual, features, logits_at)

    def _run(
        self,
        attention_pass: AttentionPass | JoinedPass,
        tokens: Tensor,
        virtual: tuple[Tensor, Tensor] | None,
        features: Sequence[Feature],
        logits_at: list[int] | None,
    ) -> TargetOutput:
        direct = self._run_directly(attention_pass, tokens, features, logits_at) if virtual is None else None
        if direct is not None:
            return direct
        inputs: dict[str, Any] = {"input_ids": tokens}
        if virtual is not None:
            is_virtual, embeddings = virtual
            embedded = self.model.get_input_embeddings()(tokens.masked_fill(is_virtual, 0))
            mixed = torch.where(is_virtual.unsqueeze(-1), embeddings.to(embedded.dtype), embedded)
            inputs = {"inputs_embeds": mixed}
        if self._keeps_logits and logits_at is not None:
            inputs["logits_to_keep"] = torch.tensor(logits_at, device=tokens.device)
        captured: dict[Feature, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(self._switch.on())
            copied = self._copied(features, attention_pass)
            attention_pass.copies = dict.fromkeys(copied.values())
            for name in features:
                if name not in copied:
                    stack.enter_context(self._capture(name, captured))
            out = self.model(
                position_ids=self._positions(attention_pass), use_cache=False, specdec_pass=attention_pass, **inputs
            )
        logits: Tensor = out.logits
        if not self._keeps_logits and logits_at is not None:
            logits = logits[:, logits_at]
        for name, index in copied.items():
            states = attention_pass.copies[index]
            assert states is not None
            captured[name] = states
        return TargetOutput(logits, {name: captured[name] for name in features})

    def _run_directly(
        self,
        now: AttentionPass | JoinedPass,
        tokens: Tensor,
        features: Sequence[Feature],
        logits_at: list[int] | None,
    ) -> TargetOutput | None:
        """``_run`` past transformers' own forward, which does no more but takes a tenth of a small pass; None where it
        does."""
        lean = self._compiled
        if lean is None or not is_stack_and_head(self.model) or not lean.takes(now):
            return None
        places = self._places(features)
        if any(name not in places and name != "last" for name in features):
            return None
        now.copies = dict.fromkeys(places.values())
        head = self.model.lm_head
        states, logits = lean.states(tokens, self._positions(now), now, head if logits_at is None else None)
        if logits is None:
            logits = head(states if logits_at is None else states[:, logits_at])
        assert logits is not None
        found: dict[Feature, Any] = {"last": states, **{name: now.copies[at] for name, at in places.items()}}
        return TargetOutput(logits, {name: found[name] for name in features})

    def _positions(self, now: AttentionPass | JoinedPass) -> Tensor:
        """Of a pass; padding may point past the last one that a model has an embedding for."""
        limit = self.max_context
        return now.positions if limit is None or now.end <= limit else now.positions.clamp(max=limit - 1)

    def _copied(self, features: Sequence[Feature], now: AttentionPass | JoinedPass) -> dict[Feature, int]:
        """Features that a compiled stack hands out itself, and how many layers come before each; others need hooks."""
        compiled = self._compiled if features else None
        if compiled is None or not compiled.takes(now):
            return {}
        return self._places(features)

    def _places(self, features: Sequence[Feature]) -> dict[Feature, int]:
        """How many layers come before each of the features that stand between layers."""
        count = self.num_layers
        places = {name: count if name == "pre_norm" else name for name in features}
        return {name: at for name, at in places.items() if isinstance(at, int) and 0 <= at <= count}

    def _new_pass(self, cache: KVCache, depth: Tensor, ancestors: Tensor) -> AttentionPass:
        """What the layers of a pass share."""
        return AttentionPass(cache, depth, ancestors)

    def _capture(self, name: Feature, into: dict[Feature, Tensor]) -> Any:
        """A hook, removed on exit, that stores a hidden state as the pass computes it."""

        def store(value: Any) -> None:
            value = getattr(value, "last_hidden_state", value)
            into[name] = value[0] if isinstance(value, tuple) else value

        if name == "last":
            return self.model.base_model.register_forward_hook(lambda _m, _a, out: store(out))
        layers = self.decoder_layers()
        index = len(layers) if name == "pre_norm" else name
        if not isinstance(index, int) or not 0 <= index <= len(layers):
            raise ValueError(f"unknown feature {name!r}: use 'last', 'pre_norm' or 0..{len(layers)}")
        if index == 0:
            return layers[0].register_forward_pre_hook(
                lambda _m, args, kwargs: store(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        return layers[index - 1].register_forward_hook(lambda _m, _a, out: store(out))

    def decoder_layers(self) -> nn.ModuleList:
        """The model's decoder layers, in order.

        Raises:
            ValueError: where they are in no list of modules.
        """
        for module in self.model.get_decoder().modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers:
                return module
        raise ValueError(f"{type(self.model).__name__} keeps its {self.num_layers} decoder layers in no ModuleList")

    @torch.inference_mode()
    def _check_layers(self) -> None:
        """Run two tokens and see that every layer went through our attention, and says what it says with its own."""
        name = type(self.model).__name__
        count = min(_PROBED, self.max_context or _PROBED)
        order = torch.arange(count, device=self.device).unsqueeze(0)
        tokens = (2 * order + 1) * self.vocab_size // (2 * count)  # the first ones are often of another kind
        causal = torch.ones(1, count, count, dtype=torch.bool, device=self.device).tril()
        probe = AttentionPass(self.new_cache(1, count), order, causal)
        try:
            with self._switch.on():
                inputs = {"input_ids": tokens, "position_ids": probe.positions, "use_cache": False}
                ours: Tensor = self.model(**inputs, specdec_pass=probe).logits
        except (RuntimeError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{name} does not run through transformers' attention interface: {error}") from error
        check_pass(self.model, self.config, probe.windows)
        check_logits(self.model, ours, self.model(**inputs).logits)


def _wanted(chunks: Sequence[Chunk], features: Sequence[Feature] = ()) -> tuple[Feature, ...]:
    """Hidden states that a pass has to give, each named once."""
    return tuple(dict.fromkeys([*features, *(name for chunk in chunks for name in chunk.states)]))

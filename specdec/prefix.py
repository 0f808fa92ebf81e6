"""Prefixes that prompts share: found for all prompts of a call up front, and computed once.

A trie over token ids says which prompts begin alike (BatchLLM, Zheng et al. 2024, section 4.1: global prefix
identification). Its inner nodes nest - system prompt, examples, question - and are prefilled a level at a time, each on
top of its parent's keys and values, which it refers to; the prompts go on from there, and share what they have read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specdec.kv_cache import KVCache
from specdec.segments import Shares, first_tokens, num_tokens
from specdec.target import Feature, HFTarget, TargetOutput

if TYPE_CHECKING:
    from specdec.prefix_store import PrefixStore

LEAST_SAVED = 16
"""Tokens that sharing must save to be worth a pass of its own."""


@dataclass(frozen=True)
class TrieNode:
    """A prefix that several prompts share.

    Attributes:
        tokens: all of it, from the prompt's beginning.
        parent: index of the longest shared prefix that it begins with; None at the top.
        level: how many there are above it.
    """

    tokens: tuple[int, ...]
    parent: int | None
    level: int


def shared_prefixes(
    prompts: Sequence[tuple[int, ...]], least_saved: int = LEAST_SAVED
) -> tuple[list[TrieNode], list[int | None]]:
    """The prefixes worth computing once.

    Args:
        prompts: token ids; those that are the same share all of them.
        least_saved: tokens that computing a prefix once, not once per prompt, must save.

    Returns:
        Nodes, parents before children, and per prompt the deepest node it begins with.
    """
    ordered = sorted(range(len(prompts)), key=lambda index: prompts[index])
    nodes: list[TrieNode] = []
    below: list[int | None] = [None] * len(prompts)
    groups: list[tuple[list[int], int | None]] = [(ordered, None)]
    while groups:
        group, parent = groups.pop()
        if len(group) < 2:
            continue
        # Sorted, so what the first and the last share, all share.
        length = common_prefix(prompts[group[0]], prompts[group[-1]])
        known = len(nodes[parent].tokens) if parent is not None else 0
        if (length - known) * (len(group) - 1) >= max(1, least_saved):
            level = 0 if parent is None else nodes[parent].level + 1
            nodes.append(TrieNode(prompts[group[0]][:length], parent, level))
            parent = len(nodes) - 1
            for index in group:
                below[index] = parent
        by_token: dict[int, list[int]] = {}
        for index in group:
            if len(prompts[index]) > length:
                by_token.setdefault(prompts[index][length], []).append(index)
        groups += [(members, parent) for members in by_token.values()]
    return nodes, below


@dataclass(frozen=True)
class SharedWork:
    """What prompts that share prefixes take.

    Attributes:
        own: most tokens of a prompt behind what it shares.
        passes: per level, and last of the prompts themselves: texts, most tokens computed of one, longest.
    """

    own: int
    passes: tuple[tuple[int, int, int], ...]

    @classmethod
    def apart(cls, prompts: int, tokens: int) -> SharedWork:
        """Of so many prompts of so many tokens that share nothing."""
        return cls(tokens, ((prompts, tokens, tokens),))

    def held(self, rows: int) -> int:
        """Tokens of the prefixes that are there at a time, at most, where so many rows run; those of a level are
        computed side by side, padded.

        Where others wait, in ``prefix_order``, what is held for them is what the row that began last begins with: that
        one runs, or its place is free.
        """
        return sum(min(texts, rows) * most for texts, most, _ in self.passes[:-1])

    @classmethod
    def of(cls, prompts: Sequence[tuple[int, ...]]) -> SharedWork:
        """For prompts, one or more."""
        nodes, below = shared_prefixes(prompts)
        levels: dict[int, list[TrieNode]] = {}
        for node in nodes:
            levels.setdefault(node.level, []).append(node)
        computed = [
            (len(level), max(len(node.tokens) - _known(nodes, node.parent) for node in level), _longest(level))
            for level in levels.values()
        ]
        known = [_known(nodes, index) for index in below]
        missing = max(len(prompt) - length for prompt, length in zip(prompts, known, strict=True))
        last = (len(prompts), missing, max(map(len, prompts)))
        return cls(missing, (*computed, last))


def _known(nodes: Sequence[TrieNode], index: int | None) -> int:
    """Tokens of a shared prefix."""
    return 0 if index is None else len(nodes[index].tokens)


def _longest(nodes: Sequence[TrieNode]) -> int:
    return max(len(node.tokens) for node in nodes)


@dataclass(frozen=True)
class Stretch:
    """The beginning of a text, computed.

    Attributes:
        shares: its keys and values, for rows to refer to.
        features: ``[length, d]`` hidden states, by name; they may go on beyond it.
    """

    shares: Shares
    features: Mapping[Feature, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens."""
        return num_tokens(self.shares)


@dataclass(eq=False)
class CommonPrefix:
    """What several prompts begin with: computed for the first of them, and held for those that come later.

    Whoever has still to compute such a prompt refers to it. Once nobody does it is gone, and its keys and values are
    where no row refers to them either.

    Attributes:
        tokens: all of it, from the prompts' beginning.
        parent: what is to be computed before it; it begins with that, or a part. None at the top, and once it is
            computed itself.
        stretch: None until it is computed.
    """

    tokens: tuple[int, ...]
    parent: CommonPrefix | None = None
    stretch: Stretch | None = None

    @property
    def missing(self) -> list[CommonPrefix]:
        """What is still to be computed of it, in order, itself the last; nothing where it is computed."""
        if self.stretch is not None:
            return []
        return [*([] if self.parent is None else self.parent.missing), self]

    def finish(self, stretch: Stretch) -> None:
        """It is computed."""
        self.stretch, self.parent = stretch, None

    def length_in(self, tokens: Sequence[int]) -> int:
        """How many tokens of a text it gives."""
        count = len(self.tokens)
        return count if tuple(tokens[:count]) == self.tokens else common_prefix(self.tokens, tokens)


def common_prefixes(
    prompts: Sequence[tuple[int, ...]], begun: Sequence[CommonPrefix] = ()
) -> list[CommonPrefix | None]:
    """Per prompt the longest prefix that is worth computing once.

    Args:
        prompts: token ids.
        begun: what is computed or being computed already, for earlier prompts; a prompt that begins like one of them
            is given that one.
    """
    nodes, deepest = shared_prefixes([*prompts, *(each.tokens for each in begun)])
    found: list[CommonPrefix] = []
    for node in nodes:
        there = [each for each in begun if each.tokens[: len(node.tokens)] == node.tokens]
        if there:
            found.append(min(there, key=lambda each: (each.stretch is None, len(each.tokens))))
        else:
            found.append(CommonPrefix(node.tokens, None if node.parent is None else found[node.parent]))
    return [None if index is None else found[index] for index in deepest[: len(prompts)]]


def prefix_order(prefixes: Sequence[CommonPrefix | None]) -> list[int]:
    """Indices of prompts such that those with a prefix in common follow each other, else in order of the first of them.

    So few prefixes are held at a time, whatever the order in which prompts come: those of running rows, and what the
    next prompt begins with.

    Args:
        prefixes: of each prompt, none of them computed yet.
    """
    first: dict[CommonPrefix, int] = {}
    lineages = [[] if prefix is None else prefix.missing for prefix in prefixes]
    for index, lineage in enumerate(lineages):
        for prefix in lineage:
            first.setdefault(prefix, index)
    return sorted(range(len(prefixes)), key=lambda index: [*(first[each] for each in lineages[index]), index])


def longest_known(
    tokens: Sequence[int], prefix: CommonPrefix | None, store: PrefixStore | None, features: Sequence[Feature]
) -> Stretch | None:
    """The longest beginning of a text that is computed, of a common prefix or one in the store.

    Args:
        tokens: the text.
        prefix: one that it begins with, or with a part of it.
        store: prefixes computed earlier.
        features: hidden states that are needed of it.
    """
    found = [] if store is None else [store.find(tokens, features)]
    if prefix is not None and prefix.stretch is not None and set(features) <= set(prefix.stretch.features):
        whole = prefix.stretch
        found.append(Stretch(first_tokens(whole.shares, prefix.length_in(tokens)), whole.features))
    return max((each for each in found if each is not None), key=lambda each: each.length, default=None)


def prefill_shared(
    target: HFTarget,
    prompts: Sequence[tuple[int, ...]],
    capacities: int | Sequence[int],
    features: Sequence[Feature] = (),
    store: PrefixStore | None = None,
    prefixes: Sequence[CommonPrefix | None] | None = None,
) -> tuple[KVCache, TargetOutput | None]:
    """Cache prompts, computing what they share once.

    Args:
        target: the model.
        prompts: token ids; they may be empty, or the same.
        capacities: tokens that rows of the cache have room for, all alike or each.
        features: hidden states to return.
        store: prefixes computed earlier.
        prefixes: of each prompt, what it shares with others, these or later ones; what of it is not computed yet is.
            Where None, what these prompts share.

    Returns:
        A cache with a row per prompt, which refers to what it shares, and the features ``[B, longest, d]`` of all their
        tokens, padded at the end; None where no prompt has a token.
    """
    prefixes = common_prefixes(prompts) if prefixes is None else prefixes
    missing = dict.fromkeys(each for prefix in prefixes if prefix is not None for each in prefix.missing)
    while missing:
        level = [each for each in missing if each.parent is None or each.parent.stretch is not None]
        texts = [each.tokens for each in level]
        origins = [longest_known(each.tokens, each.parent, store, features) for each in level]
        cache, output = extend_from(target, texts, origins, [*map(len, texts)], features)
        states = _taken_apart(output, [*map(len, texts)])
        for each, shares, found in zip(level, cache.give_away(), states, strict=True):
            each.finish(Stretch(shares, found))
            del missing[each]
    origins = [longest_known(prompt, prefix, store, features) for prompt, prefix in zip(prompts, prefixes, strict=True)]
    return extend_from(target, prompts, origins, capacities, features)


@torch.inference_mode()
def extend_from(
    target: HFTarget,
    texts: Sequence[Sequence[int]],
    origins: Sequence[Stretch | None],
    capacities: int | Sequence[int],
    features: Sequence[Feature] = (),
) -> tuple[KVCache, TargetOutput | None]:
    """Cache texts of which the beginnings are there.

    Args:
        target: the model.
        texts: token ids.
        origins: what each begins with.
        capacities: tokens that rows have room for, all alike or each.
        features: hidden states to return, ``[B, longest, d]`` of the whole texts.

    Returns:
        A new cache with a row per text, and logits and features; None where no text has a token.
    """
    each = [capacities] * len(texts) if isinstance(capacities, int) else capacities
    cache = target.new_cache(len(texts), max(1, *each))
    if not isinstance(capacities, int):
        cache.fit(capacities)
    for row, source in enumerate(origins):
        if source is not None:
            cache.share(row, first_tokens(source.shares, len(texts[row])))
    known = cache.row_lengths
    missing = [list(text[length:]) for text, length in zip(texts, known, strict=True)]
    if not any(texts):
        return cache, None
    output = TargetOutput(torch.empty(0)) if not any(missing) else target.extend(missing, cache, features)
    if not any(known):
        return cache, output
    states = {name: _put_together(name, texts, known, origins, output) for name in features}
    return cache, TargetOutput(output.logits, states)


def _put_together(
    name: Feature,
    texts: Sequence[Sequence[int]],
    known: Sequence[int],
    origins: Sequence[Stretch | None],
    output: TargetOutput,
) -> Tensor:
    """``[B, longest, d]``: each row's hidden states that were known, then those that were computed."""
    like = next((source.features[name] for source in origins if source is not None), None)
    assert like is not None
    whole = like.new_zeros(len(texts), max(map(len, texts)), like.shape[-1])
    for row, (text, length, source) in enumerate(zip(texts, known, origins, strict=True)):
        if source is not None:
            whole[row, :length] = source.features[name][:length]
        if length < len(text):
            whole[row, length : len(text)] = output.features[name][row, : len(text) - length]
    return whole


def _taken_apart(output: TargetOutput | None, lengths: Sequence[int]) -> list[dict[Feature, Tensor]]:
    """Each row's hidden states ``[length, d]``, taken out of the output; copies: none keeps the others' memory."""
    found: list[dict[Feature, Tensor]] = [{} for _ in lengths]
    states = {} if output is None else output.features
    for name in [*states]:
        value = states.pop(name)  # one by one: there is not all of it twice
        for row, length in enumerate(lengths):
            found[row][name] = value[row, :length].clone() if len(lengths) > 1 else value[row]
    return found


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))

"""Self-speculation: some of the target's own layers draft, without training, in the target's own KV cache.

Skipping layers as in Zhang et al. 2024 ("Draft & Verify"); the first k layers alone are an early exit as in LayerSkip
(Elhoushi et al. 2024), here of a model that was not trained for it. The state that leaves the last kept layer goes
through the target's final norm and output head.

A draft pass reads the keys and values of the committed tokens that the target's own passes left, and writes those of
the draft nodes behind them, where the target's next pass writes anyway. So there is no second cache and nothing to
catch up with. Of the first k layers these keys and values are the draft's own to the bit; behind a gap they are the
whole model's, which is what the draft approximates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from specdec.batch import Batch
from specdec.drafters.base import Drafter
from specdec.drafters.growth import grow, rank
from specdec.drafters.heads import drafting_head
from specdec.drafters.pruned import choose_layers
from specdec.drafters.weights import TargetFacts, check_weights, find_pretrained, load_weights
from specdec.kv_cache import KVCache
from specdec.target import HFTarget
from specdec.tree import TokenTree

NAME = "skip"

KEPT = Path("~/.cache/specdec/skip")
"""Where ``specdec calibrate`` keeps the layers it found for a target, unless it is told another folder."""

_KEPT_SHARE = 2 / 3
"""Of the layers, where none were searched: with fewer a model that was not trained for it is hardly ever right."""


@dataclass(frozen=True)
class SkipConfig:
    """Options of self-speculation.

    Attributes:
        weights: folder that ``specdec calibrate --drafter skip`` wrote: layers and vocabulary. "" is what it found for
            the target on this machine, or what ships, unless layers are asked for here.
        layers: the layers that draft, such as "0-5" for an early exit or "0,1,4,28-29"; these instead of a folder's.
        count: how many layers draft, of both ends alike, instead of a folder's; 0 leaves it to the folder, and is two
            thirds of them where there is none.
        depth: draft passes per step, depth of the tree.
        width: nodes expanded per depth.
        branching: children considered per node.
        max_nodes: most nodes of a tree, root included.
    """

    weights: str = ""
    layers: str = ""
    count: int = 0
    depth: int = 3
    width: int = 2
    branching: int = 4
    max_nodes: int = 10

    def __post_init__(self) -> None:
        for name, least in (("count", 0), ("depth", 1), ("width", 1), ("branching", 1), ("max_nodes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.layers:
            parse_layers(self.layers)
            if self.count:
                raise ValueError(f"layers={self.layers!r} and count={self.count} exclude each other: give one of them")


def parse_layers(text: str) -> list[int]:
    """Indices from "0-3,29"; raises ValueError where they do not ascend or are none."""
    found: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            found += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        found = []
    if not found or found != sorted(set(found)):
        raise ValueError(f'layers must be ascending indices and ranges such as "0-3,29", got {text!r}')
    return found


def kept_folder(target: TargetFacts) -> Path:
    """Where the layers found for a target are kept on this machine."""
    return KEPT.expanduser() / f"{NAME}-{target.fingerprint}"


class SkippedLayers:
    """A target run through some of its layers.

    Args:
        target: the model; its modules are used, not copied, and it is left as it was after each pass.
        layers: indices of the layers to run, ascending.
        head: output head instead of the target's, over fewer tokens.

    Raises:
        ValueError: for layers the target does not have.
    """

    def __init__(self, target: HFTarget, layers: Sequence[int], head: nn.Module | None = None) -> None:
        if not layers or list(layers) != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < target.num_layers:
            raise ValueError(f"layers must ascend within 0 .. {target.num_layers - 1}, got {list(layers)}")
        self.layers = tuple(layers)
        self._target, self._head = target, head
        every = target.decoder_layers()
        self._owner, self._name = _place(target.model, every)
        self.kept = nn.ModuleList([every[index] for index in layers])
        # What the configuration says of each layer, as some models ask it while they run.
        self._settings: dict[str, list[Any]] = {
            key: [value[index] for index in layers]
            for key, value in vars(target.config).items()
            if isinstance(value, list) and len(value) == target.num_layers
        }

    def run(self, tokens: Tensor, cache: KVCache, depth: Tensor, ancestors: Tensor) -> Tensor:
        """Logits ``[B, n, V']``; arguments as ``HFTarget.run`` takes them."""
        with self._skipping():
            return self._target.run(tokens, None, cache, depth, ancestors).logits

    def forward(self, tree: TokenTree, cache: KVCache, first_node: int) -> Tensor:
        """Logits ``[B, N - first_node, V']`` at a tree's nodes from a column on; those before it were computed."""
        cache.make_room(tree.num_nodes)
        return self.run(tree.tokens[:, first_node:], cache, tree.depth, tree.ancestors[:, first_node:])

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        model, config = self._target.model, self._target.config
        every, output = getattr(self._owner, self._name), model.get_output_embeddings()
        settings = {key: getattr(config, key) for key in self._settings}
        try:
            setattr(self._owner, self._name, self.kept)
            for key, value in self._settings.items():
                setattr(config, key, value)
            if self._head is not None:
                model.set_output_embeddings(self._head)
            yield
        finally:
            setattr(self._owner, self._name, every)
            for key, value in settings.items():
                setattr(config, key, value)
            if self._head is not None:
                model.set_output_embeddings(output)


def _place(model: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    """The module of a model that holds another, and the name it has there."""
    return next((owner, name) for owner in model.modules() for name, child in owner.named_children() if child is module)


class SkipDrafter(Drafter):
    """Some of the target's own layers draft a tree by joint confidence (EAGLE-2's, Li et al. 2024)."""

    name = NAME
    Config = SkipConfig
    reads_logits = False

    def __init__(self, config: SkipConfig | None = None) -> None:
        self.config = config or SkipConfig()

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        layers, vocabulary = self._choose(target)
        self._vocabulary = None if vocabulary is None else vocabulary.to(target.device)
        self._head = None if vocabulary is None else drafting_head(target, self._vocabulary)
        self._draft = SkippedLayers(target, layers, self._head)

    def _choose(self, target: HFTarget) -> tuple[list[int], Tensor | None]:
        """Layers, and the tokens that can be drafted; None for all."""
        config, facts = self.config, TargetFacts.of(target)
        folder: str | Path | None = config.weights
        if not (folder or config.layers or config.count):
            folder = find_pretrained(self.name, facts, KEPT.expanduser()) or find_pretrained(self.name, facts)
        layers = choose_layers(target.num_layers, config.count or max(1, round(target.num_layers * _KEPT_SHARE)))
        vocabulary = None
        if folder:
            weights = load_weights(Path(folder).expanduser())
            check_weights(weights, self.name, facts)
            vocabulary = weights.tensors.get("vocabulary")
            layers = layers if config.count else list(weights.shape["layers"])
        return parse_layers(config.layers) if config.layers else layers, vocabulary

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that draft."""
        return self._draft.layers

    def propose(self, batch: Batch) -> TokenTree:
        depth = min(self.config.depth, max(row.max_depth for row in batch.rows))
        max_nodes = min(self.config.max_nodes, batch.max_nodes)
        cache = batch.cache
        if cache is None or depth < 1 or max_nodes < 2:
            return TokenTree.from_pending(batch.pending)

        def expand(tree: TokenTree, first: int, level: int) -> tuple[Tensor, Tensor]:
            logits = self._draft.forward(tree, cache, first)
            return rank(batch, logits, self.config.branching, tree, first, level, self._vocabulary)

        return grow(batch.pending, depth, self.config.width, max_nodes, expand)

"""A target whose passes over trees are captured CUDA graphs: the host launches one graph instead of a thousand kernels.

A graph holds addresses and sizes, so there is one per batch size and number of nodes, rounded up to a *bucket*; trees
are padded to it. All that changes between passes lies in device tensors: the tree's tokens and parents, and each row's
length, by which keys and values are written and read. Buffers keep their addresses across calls: caches are handed out
of a pool, and graphs belong to the pool's buffers. A pass waits for nothing on the host.

Where there is no CUDA, or a pass cannot be captured, the target is an ``HFTarget`` and says why in ``fallback``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from specdec.attention import AttentionPass
from specdec.kernels.trees import by_products
from specdec.kv_cache import KVCache
from specdec.pooled_cache import BufferPools, DeviceCache, PooledKVCache
from specdec.target import Feature, HFTarget, TargetOutput
from specdec.tree import PADDING, ROOT, TokenTree

BUCKETS = (1, 2, 4, 8, 16, 32, 64)
"""Nodes per row that a graph is captured for; a larger tree runs without one."""

WARM_UPS = 2
"""Passes before one is captured: kernels are compiled and workspaces allocated in them."""


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Do it again, on the same addresses."""


class GraphMaker(Protocol):
    """Records work."""

    def capture(self, run: Callable[[], None]) -> Graph:
        """Record what ``run`` does on the device. Raises RuntimeError where it cannot be recorded."""


class CudaGraphs:
    """``torch.cuda.CUDAGraph``; all graphs share one pool of memory for what lives within a pass."""

    def __init__(self) -> None:
        self._pool: Any = None

    def capture(self, run: Callable[[], None]) -> Graph:
        """See ``GraphMaker.capture``."""
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            run()
        self._pool = self._pool or graph.pool()
        return graph


def bucket_of(nodes: int, buckets: Sequence[int] = BUCKETS) -> int | None:
    """The smallest bucket that holds so many nodes; None where none does."""
    return min((bucket for bucket in buckets if bucket >= nodes), default=None)


def find_maker(device: torch.device) -> GraphMaker | None:
    """What records passes on a device; None where nothing does."""
    return CudaGraphs() if device.type == "cuda" else None


class DevicePass(AttentionPass):
    """An attention pass of which the host knows sizes only."""

    def mask(self, window: int | None) -> Tensor:
        """``[B, n, S]`` bool over all slots, made within the graph at the first layer that reads it."""
        if window not in self._masks:
            self._masks[window] = self.rules(window).dense(self.cache.capacity)
        return self._masks[window]


@dataclass(frozen=True)
class GraphKey:
    """What a graph is captured for.

    Attributes:
        rows: batch size.
        nodes: the bucket.
        features: hidden states it returns.
        virtual: width and dtype of virtual nodes' embeddings, None where there are none.
    """

    rows: int
    nodes: int
    features: tuple[Feature, ...] = ()
    virtual: tuple[int, torch.dtype] | None = None


@dataclass
class CapturedPass:
    """A graph and the tensors it reads and writes.

    Attributes:
        tokens, parents: ``[B, bucket]`` of the tree, padding at the end.
        virtual, embeddings: ``[B, bucket]`` and ``[B, bucket, d]`` of virtual nodes, or None.
        output: what it wrote last.
        graph: the recorded pass.
    """

    tokens: Tensor
    parents: Tensor
    virtual: Tensor | None
    embeddings: Tensor | None
    output: TargetOutput = field(default_factory=lambda: TargetOutput(torch.empty(0)))
    graph: Graph | None = None

    @classmethod
    def allocate(cls, key: GraphKey, device: torch.device) -> CapturedPass:
        """Inputs of the key's sizes: roots alone."""
        shape = (key.rows, key.nodes)
        embeddings = virtual = None
        if key.virtual is not None:
            width, dtype = key.virtual
            virtual = torch.zeros(shape, dtype=torch.bool, device=device)
            embeddings = torch.zeros(*shape, width, dtype=dtype, device=device)
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        return cls(tokens, torch.full_like(tokens, PADDING), virtual, embeddings)

    def load(self, tree: TokenTree) -> None:
        """Copy a tree in."""
        count = tree.num_nodes
        if count < self.tokens.shape[1]:
            self.parents.fill_(PADDING)
        self.tokens[:, :count].copy_(tree.tokens)
        self.parents[:, :count].copy_(tree.parents)
        if self.virtual is not None and self.embeddings is not None:
            assert tree.virtual is not None
            assert tree.embeddings is not None
            self.virtual.zero_()
            self.virtual[:, :count].copy_(tree.virtual)
            self.embeddings[:, :count].copy_(tree.embeddings)

    def result(self, count: int) -> TargetOutput:
        """What it wrote about the first columns, copied: the next replay, of any graph, writes over it."""
        logits = self.output.logits[:, :count].clone()
        return TargetOutput(logits, {name: value[:, :count].clone() for name, value in self.output.features.items()})


class GraphTarget(HFTarget):
    """An ``HFTarget`` that captures its passes over trees.

    Args:
        model: as ``HFTarget`` takes it.
        maker: records passes; CUDA's where the model is on such a device, none elsewhere.
        buckets: nodes per row that graphs are captured for.

    Raises:
        ValueError: as ``HFTarget`` does.
    """

    def __init__(self, model: Any, maker: GraphMaker | None = None, buckets: Sequence[int] = BUCKETS) -> None:
        self.fallback: str | None = None
        """Why passes run without a graph, None while they have one."""
        self.replays = 0
        """Passes that were a graph's."""
        self.captures = 0
        """Graphs that were captured."""
        self._pools: BufferPools | None = None
        self._buckets = tuple(sorted(buckets))
        super().__init__(model)
        self._maker = maker = maker or find_maker(self.device)
        if maker is None:
            self.fallback = f"graphs need a CUDA device, the model is on {self.device}"
        else:
            self._pools = BufferPools(self.device)

    @torch.inference_mode()
    def try_out(self) -> None:
        """Capture a pass over one node now; ``fallback`` says whether that went well."""
        root = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        cache = self.new_cache(1, 2)
        self.extend([[0]], cache)
        self.forward(TokenTree(root, torch.full_like(root, ROOT)), cache)

    @property
    def waits_after_phases(self) -> bool:
        """Waiting would leave the device idle while the host prepares what follows."""
        return self.fallback is not None and super().waits_after_phases

    @property
    def refers_to_segments(self) -> bool:
        """See ``HFTarget.refers_to_segments``."""
        return self._pools is None and super().refers_to_segments

    def new_cache(self, batch_size: int, capacity: int) -> KVCache:
        """See ``HFTarget.new_cache``."""
        if self._pools is None or self.kv_bits is not None:
            return super().new_cache(batch_size, capacity)
        return PooledKVCache(self._pools, batch_size, capacity, self.device)

    def forward(
        self, tree: TokenTree, cache: KVCache, features: Sequence[Feature] = (), first_node: int = 0
    ) -> TargetOutput:
        """See ``HFTarget.forward``."""
        bucket = bucket_of(tree.num_nodes, self._buckets)
        eager = self.fallback is not None or not isinstance(cache, PooledKVCache) or torch.is_grad_enabled()
        if eager or bucket is None or first_node > 0:
            return super().forward(tree, cache, features, first_node)
        assert isinstance(cache, PooledKVCache)
        cache.make_room(bucket)
        embeddings = tree.embeddings
        virtual = None if embeddings is None else (embeddings.shape[-1], embeddings.dtype)
        key = GraphKey(tree.batch_size, bucket, tuple(features), virtual)
        replayed = self._replay(key, tree, cache)
        return super().forward(tree, cache, features) if replayed is None else replayed

    @torch.inference_mode()
    def _replay(self, key: GraphKey, tree: TokenTree, cache: PooledKVCache) -> TargetOutput | None:
        """The pass by its graph, captured where it is the first such; None where it cannot be."""
        captured: CapturedPass | None = cache.pool.recorded.get(key)
        if captured is None:
            captured = self._capture_pass(key, tree, cache)
            if captured is None:
                return None
        else:
            captured.load(tree)
        assert captured.graph is not None
        captured.graph.replay()
        self.replays += 1
        return captured.result(tree.num_nodes)

    def _capture_pass(self, key: GraphKey, tree: TokenTree, cache: PooledKVCache) -> CapturedPass | None:
        """Record a pass, and see that it gives what it gave when it ran; None, for good, where either fails."""
        assert self._maker is not None
        captured, pool = CapturedPass.allocate(key, self.device), cache.pool

        def run() -> None:
            ancestors, depth = by_products(captured.parents)
            virtual = None
            if captured.virtual is not None and captured.embeddings is not None:
                virtual = captured.virtual, captured.embeddings
            captured.output = self.run(captured.tokens, virtual, DeviceCache(cache), depth, ancestors, key.features)

        captured.load(tree)
        try:
            run()
            expected = captured.result(tree.num_nodes)
            captured.graph = self._maker.capture(run)
            captured.graph.replay()
            check_same(captured.result(tree.num_nodes), expected)
        except RuntimeError as error:
            self.fallback = f"a pass of {key.rows} rows and {key.nodes} nodes could not be captured: {error}"
            warnings.warn(f"{self.fallback}; passes run without graphs", RuntimeWarning, stacklevel=3)
            return None
        self.captures += 1
        pool.recorded[key] = captured
        return captured

    def _new_pass(self, cache: KVCache, depth: Tensor, ancestors: Tensor) -> AttentionPass:
        kind = DevicePass if isinstance(cache, DeviceCache) else AttentionPass
        return kind(cache, depth, ancestors)


def check_same(found: TargetOutput, expected: TargetOutput) -> None:
    """Raise RuntimeError where outputs differ by more than the order of sums may explain: 16 roundings of the largest.

    NaN equals NaN: a model that fails does so with and without a graph.
    """
    pairs = [(found.logits, expected.logits), *((found.features[name], x) for name, x in expected.features.items())]
    for mine, theirs in pairs:
        bound = 16 * torch.finfo(theirs.dtype).eps * float(theirs.float().nan_to_num(0.0, 0.0, 0.0).abs().max())
        if not torch.allclose(mine.float(), theirs.float(), rtol=0.0, atol=bound, equal_nan=True):
            worst = float((mine.float() - theirs.float()).abs().max())
            raise RuntimeError(f"its replay differs from the pass it was recorded from by {worst:.3g}")


def check_graphs(cuda_graphs: bool | None, device: torch.device, kv_bits: int | None) -> None:
    """Raise ValueError where graphs are asked for that a target on this device cannot have, with what to do."""
    if not cuda_graphs:
        return
    if find_maker(device) is None:
        raise ValueError(
            f"cuda_graphs=True needs a CUDA device, the model's is {str(device)!r}: load it with device='cuda', or "
            "leave cuda_graphs out"
        )
    if kv_bits is not None:
        raise ValueError(
            f"cuda_graphs=True and kv='int{kv_bits}': passes over a quantized cache are not captured; leave one out"
        )


def make_target(model: Any, kv_bits: int | None = None, cuda_graphs: bool | None = None) -> HFTarget:
    """The target that decodes with a loaded model.

    Args:
        model: as ``HFTarget`` takes it.
        kv_bits: of a number in its KV caches; None is the dtype's.
        cuda_graphs: True makes a ``GraphTarget`` and captures a first pass, False and None a plain ``HFTarget``.

    Raises:
        ValueError: as ``HFTarget`` does; where passes are to be captured and cannot be, with the reason.
    """
    if not cuda_graphs:
        target = HFTarget(model)
        target.kv_bits = kv_bits
        return target
    graphed = GraphTarget(model)
    check_graphs(cuda_graphs, graphed.device, kv_bits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the error says it
        graphed.try_out()
    if graphed.fallback is not None:
        raise ValueError(f"cuda_graphs=True of {type(model).__name__}: {graphed.fallback}. Leave cuda_graphs out")
    return graphed

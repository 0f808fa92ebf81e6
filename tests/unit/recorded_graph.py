"""A graph without CUDA: operations are recorded with the very tensors they read and wrote, and done again on those.

As with CUDA's, what the host knew at the time is fixed, addresses are, and asking the device for a value while
recording fails.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero")
"""Operations whose result the host needs."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in WAITS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class RecordedGraph:
    """What was recorded."""

    def __init__(self, calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]]) -> None:
        self._calls = calls

    def replay(self) -> None:
        for func, args, kwargs, out in self._calls:
            again = func(*args, **kwargs)
            for new, old in zip(tree_leaves(again), tree_leaves(out), strict=True):
                if isinstance(old, Tensor) and new.data_ptr() != old.data_ptr():
                    old.copy_(new)


class RecordingMaker:
    """Makes such graphs; counts them."""

    def __init__(self) -> None:
        self.made = 0

    def capture(self, run: Callable[[], None]) -> RecordedGraph:
        with _Recorder() as recorder:
            run()
        self.made += 1
        return RecordedGraph(recorder.calls)


class BrokenMaker:
    """Cannot record anything."""

    def capture(self, run: Callable[[], None]) -> RecordedGraph:
        raise RuntimeError("no stream to capture on")


class WrongMaker(RecordingMaker):
    """Records graphs whose replay does nothing to what was computed but spoil it."""

    def capture(self, run: Callable[[], None]) -> Any:
        graph = super().capture(run)
        calls = graph._calls

        class Spoiled:
            def replay(self) -> None:
                graph.replay()
                calls[-1][3].add_(1.0)

        return Spoiled()

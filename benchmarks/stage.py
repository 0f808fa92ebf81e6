"""Where contenders stand while they are compared: which of them are loaded, and that one computes at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specdec.benchmarks.contenders import Contender
from specdec.benchmarks.peers import PeerDied, PeerHello, PeerReply
from specdec.benchmarks.peers.quiet import OWN, Meter, available_memory_bytes, settle

MEMORY_RESERVE_BYTES = 5 * 2**30
"""What must be free before another engine is loaded: the hungriest takes so much while it compiles."""


@dataclass(frozen=True)
class Answer:
    """A timed reply.

    Attributes:
        reply: what came.
        busy: names of contenders whose processes still computed when it began.
        foreign_cpus: processors kept busy by anything but the contender meanwhile; None where unknown.
    """

    reply: PeerReply
    busy: tuple[str, ...]
    foreign_cpus: float | None


class Stage:
    """Loads contenders when they are needed, warms them up, and times them one by one.

    Contenders stay loaded while there is room. As all take their turns in a circle, the one that answered last is
    needed last, so it is the one to go where there is none.

    Args:
        warm_up: a prompt that everybody answers right after loading.
        warm_up_tokens: tokens of that answer.
        eos_ids: ids that end a text.
        most: peers loaded at a time; None for as many as the memory holds.
        say: told what is being loaded.
    """

    def __init__(
        self,
        warm_up: Sequence[int],
        warm_up_tokens: int,
        eos_ids: Sequence[int],
        most: int | None,
        say: Callable[[str], None],
    ) -> None:
        self._warm_up = warm_up
        self._warm_up_tokens = warm_up_tokens
        self._eos_ids = eos_ids
        self._most = most
        self._say = say
        self._loaded: list[Contender] = []  # peers alone; the one that answered last stands last

    def ready(self, contender: Contender) -> PeerHello | None:
        """Have a contender loaded and warmed up.

        Returns:
            What it says of itself where it was loaded now; None where it was loaded already.

        Raises:
            PeerError: it cannot be loaded, fails to warm up, or has ended by itself since it was loaded.
        """
        name = contender.entrant.name
        if contender in self._loaded:
            if contender.group is None:
                raise PeerDied(f"{name} ended while it had nothing to do")
            self._loaded.remove(contender)
            self._loaded.append(contender)
            return None
        if contender.group is not None:
            return None
        while self._loaded and self._is_full():
            self.close(self._loaded[-1])
        if not contender.entrant.ours:
            self._say(f"loading {name}")
        hello = contender.load()
        if not contender.entrant.ours:
            self._loaded.append(contender)
        contender.answer(self._warm_up, self._warm_up_tokens, self._eos_ids)
        return hello

    def ask(self, contender: Contender, prompt_ids: Sequence[int], max_new_tokens: int) -> Answer:
        """Time a contender that is ready, once nobody else computes; raises PeerError where it fails."""
        names = {other.group: other.entrant.name for other in self._loaded if other.group is not None}
        if contender.group is not None:
            names.pop(contender.group, None)
        watched = [*names] if contender.group == OWN else [*names, OWN]
        busy = tuple(sorted(names.get(group, "specdec") for group in settle(watched)))
        meter = Meter(OWN if contender.group is None else contender.group)
        reply = contender.answer(prompt_ids, max_new_tokens, self._eos_ids)
        return Answer(reply, busy, meter.foreign_cpus())

    def close(self, contender: Contender) -> None:
        """Unload a contender."""
        if contender in self._loaded:
            self._loaded.remove(contender)
        contender.close()

    def clear(self) -> None:
        """Unload everybody."""
        for contender in [*self._loaded]:
            self.close(contender)

    def _is_full(self) -> bool:
        if self._most is not None and len(self._loaded) >= self._most:
            return True
        available = available_memory_bytes()
        return available is not None and available < MEMORY_RESERVE_BYTES

"""Where time is counted."""

from __future__ import annotations

from time import sleep

from specdec.stats import PhaseClock


def test_a_phase_waits_for_the_work_it_queued() -> None:
    clock = PhaseClock(finish=lambda: sleep(0.02))
    with clock.phase("target"):
        pass
    with clock.phase("accept"):
        pass
    times = clock.stop()
    assert times["target"] >= 20.0
    assert times["accept"] >= 20.0
    assert times["draft"] == 0.0

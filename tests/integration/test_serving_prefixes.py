"""What requests that wait at the same time begin with alike is computed once, whenever their turns come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from integration.counting import VOCAB, Counting, counting_target
from specdec.decoder import SpecDecoder
from specdec.serving import ServedStream, Server
from specdec.target import HFTarget

HEAD = [(5 * n + n // 7) % VOCAB for n in range(120)]
ALIKE = [[*HEAD, row, row + 1, 3, 4] for row in range(6)]
OTHER = [(7 * n + n // 5 + 50) % VOCAB for n in range(40)]


@pytest.fixture(scope="module")
def target() -> Counting:
    return counting_target(512)


def make(target: HFTarget, **options: Any) -> SpecDecoder:
    return SpecDecoder(target, "none", adaptive=False, on_drafter_error="raise", **options)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Give up where something waits for ever."""
    return asyncio.run(asyncio.wait_for(work, 60))


async def finish(streams: list[ServedStream]) -> list[list[int]]:
    return [(await stream.wait()).token_ids for stream in streams]


def held(server: Server) -> list[int]:
    """Lengths of the prefixes that are there for requests to come."""
    assert server._generation is not None
    return sorted(len(each.tokens) for each in server._generation._waiting.held)


@pytest.mark.parametrize("max_rows", [1, 2, 6])
def test_waiting_requests_share_though_few_run_at_a_time(target: Counting, max_rows: int) -> None:
    decoder = make(target)
    expected = [decoder.generate(prompt, max_new_tokens=4).token_ids for prompt in ALIKE]
    target.computed = 0

    async def work() -> list[list[int]]:
        async with decoder.serve(max_rows=max_rows) as server:
            return await finish([await server.submit(prompt, max_new_tokens=4) for prompt in ALIKE])

    assert run(work()) == expected
    assert target.computed == 120 + 6 * 3 + 6 * 4


def test_a_request_that_comes_later_builds_on_what_is_held_for_another(target: Counting) -> None:
    prompts = [ALIKE[0], ALIKE[1], [*HEAD[:70], 9, 9, 9]]
    decoder = make(target)
    expected = [decoder.generate(prompt, max_new_tokens=6).token_ids for prompt in prompts]
    target.computed = 0

    async def work() -> None:
        async with decoder.serve(max_rows=1) as server:
            streams = [await server.submit(prompt, max_new_tokens=6) for prompt in prompts[:2]]
            await anext(streams[0])
            streams.append(await server.submit(prompts[2], max_new_tokens=6))
            assert await finish(streams) == expected

    run(work())
    assert target.computed == 120 + 2 * 3 + 2 + 3 * 6


def test_what_was_held_for_a_cancelled_request_is_released(target: Counting) -> None:
    async def work() -> None:
        async with make(target).serve(max_rows=1) as server:
            first, second = [await server.submit(prompt, max_new_tokens=300) for prompt in ALIKE[:2]]
            await anext(first)
            assert held(server) == [120]
            second.cancel()
            await second.wait()
            await anext(first)
            assert held(server) == []
            first.cancel()

    run(work())


def test_requests_of_other_parameters_are_not_held_for(target: Counting) -> None:
    """They run in a batch of their own, which begins anew."""

    async def work() -> None:
        async with make(target, verifier="rejection").serve(max_rows=1) as server:
            fields: list[dict[str, Any]] = [{"temperature": 0.5}, {"temperature": 1.5}, {"temperature": 0.5}]
            streams = [
                await server.submit(prompt, max_new_tokens=3, **each)
                for prompt, each in zip(ALIKE, fields, strict=False)
            ]
            await anext(streams[0])
            assert held(server) == []
            assert [len(text) for text in await finish(streams)] == [3, 3, 3]

    run(work())


def test_without_sharing_each_prompt_is_computed_by_itself(target: Counting) -> None:
    target.computed = 0

    async def work() -> None:
        async with make(target, share_prefixes=False).serve(max_rows=2) as server:
            await finish([await server.submit(prompt, max_new_tokens=2) for prompt in ALIKE])

    run(work())
    assert target.computed == 6 * 123 + 6 * 2


def planned(target: Counting, check: Callable[[SpecDecoder, Server], None], prompts: list[list[int]]) -> None:
    """Call ``check`` while the first of the requests runs, and the others wait."""

    async def work() -> None:
        decoder = make(target)
        async with decoder.serve(max_rows=1) as server:
            streams = [await server.submit(prompt, max_new_tokens=20) for prompt in prompts]
            await anext(streams[0])
            with server.between_passes:
                check(decoder, server)
            for stream in streams:
                stream.cancel()

    run(work())


def test_rows_are_planned_with_what_they_hold_and_share(target: Counting) -> None:
    def check(_: SpecDecoder, server: Server) -> None:
        assert server._generation is not None
        rows = [*(each.row for each in server._running.values()), *(each.row for each in server._waiting)]
        for count, own, tokens in ((1, 3, 120), (3, 3, 120), (4, 39, 120)):
            work = server._generation.shared_work(rows[:count])
            assert (work.own, work.held(count)) == (own, tokens)
            assert work.passes[-1][0] == count

    planned(target, check, [*ALIKE[:3], OTHER])


def test_a_prefix_to_come_is_planned_before_it_is_computed(target: Counting) -> None:
    def check(_: SpecDecoder, server: Server) -> None:
        assert server._generation is not None
        rows = [*(each.row for each in server._running.values()), *(each.row for each in server._waiting)]
        assert [server._generation.shared_work(rows[:count]).held(count) for count in (1, 2, 3)] == [0, 120, 120]

    planned(target, check, [OTHER, *ALIKE[:2]])


def test_what_is_held_for_others_keeps_no_request_out(target: Counting) -> None:
    """The first shares with the third; the second needs all the memory there is."""
    decoder = make(target)
    large = [*OTHER, *[8] * 200]
    prompts = [ALIKE[0], large, ALIKE[1]]
    expected = [decoder.generate(prompt, max_new_tokens=20).token_ids for prompt in prompts]
    budget = decoder._plan_memory([decoder._make_request(large, None, {"max_new_tokens": 20})[0]], None, True).total
    tight = make(target, memory_budget=budget)
    target.computed = 0

    async def work() -> None:
        async with tight.serve(max_rows=4) as server:
            streams = [await server.submit(prompt, max_new_tokens=20) for prompt in prompts]
            assert await finish(streams) == expected

    run(work())
    assert target.computed == 2 * 123 + len(large) - 1 + 3 * 20  # the prefix had to go, and was computed again

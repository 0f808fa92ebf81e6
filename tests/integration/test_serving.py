"""Requests served side by side: each gets its own text, cancelling and waiting disturb nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdec.decoder import SpecDecoder
from specdec.drafters.none import NoneDrafter
from specdec.serving import ServedStream, Server
from specdec.target import HFTarget

VOCAB = 96
PROMPTS = [[5, 9, 5, 9, 5], [60, 2, 60, 2], [7], [33, 34, 35, 33, 34], [1, 2, 3, 4, 5, 6]]
LENGTHS = [4, 20, 9, 14, 6]


@pytest.fixture(scope="module")
def target() -> HFTarget:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCAB, initializer_range=0.3, max_position_embeddings=256, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return HFTarget(LlamaForCausalLM(config))


def make(target: HFTarget, drafter: Any = "ngram", **options: Any) -> SpecDecoder:
    return SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise", **options)


def run(work: Coroutine[Any, Any, Any], seconds: float = 60) -> Any:
    """Give up where something waits for ever."""
    return asyncio.run(asyncio.wait_for(work, seconds))


@pytest.mark.parametrize("max_rows", [1, 3])
def test_every_request_gets_its_own_text(target: HFTarget, max_rows: int) -> None:
    decoder = make(target)
    # Parameters differ between requests: length, and how tokens are chosen.
    fields: list[dict[str, Any]] = [{"max_new_tokens": length} for length in LENGTHS]
    fields[2] |= {"temperature": 0.8, "seed": 7}
    fields[4] |= {"temperature": 0.8, "seed": 8}
    expected = [
        decoder.generate(prompt, **each).token_ids for prompt, each in zip(PROMPTS, fields, strict=True)
    ]  # fmt: skip

    async def work() -> list[list[int]]:
        async def client(prompt: list[int], each: dict[str, Any]) -> list[int]:
            stream = await server.submit(prompt, **each)
            pieces = [piece.token_id async for piece in stream]
            assert pieces == stream.result.token_ids
            assert stream.result.finish_reason == "length"
            return stream.result.token_ids

        async with decoder.serve(max_rows=max_rows) as server:
            return await asyncio.gather(*map(client, PROMPTS, fields))

    assert run(work()) == expected


def test_leaving_the_block_waits_for_what_is_under_way(target: HFTarget) -> None:
    decoder = make(target)

    async def work() -> list[Any]:
        async with decoder.serve(max_rows=2) as server:
            streams = [await server.submit(prompt, max_new_tokens=5) for prompt in PROMPTS]
        with pytest.raises(RuntimeError, match="the server is closed"):
            await server.submit(PROMPTS[0])
        return [stream.result for stream in streams]

    results = run(work())
    assert [result.finish_reason for result in results] == ["length"] * len(PROMPTS)
    assert [result.token_ids for result in results] == [
        decoder.generate(prompt, max_new_tokens=5).token_ids for prompt in PROMPTS
    ]


def test_cancelling_frees_the_place_and_disturbs_nobody(target: HFTarget) -> None:
    decoder = make(target)
    expected = [decoder.generate(prompt, max_new_tokens=12).token_ids for prompt in PROMPTS]

    async def work() -> None:
        async with decoder.serve(max_rows=2) as server:
            endless = await server.submit(PROMPTS[0], max_new_tokens=240)
            others = [await server.submit(prompt, max_new_tokens=12) for prompt in PROMPTS[1:]]
            never = await server.submit(PROMPTS[0], max_new_tokens=240)
            never.cancel()  # before it runs
            first = await anext(endless)
            endless.cancel()  # a pass is in flight
            results = [await stream.wait() for stream in others]
            assert [result.token_ids for result in results] == expected[1:]
            assert (await never.wait()).finish_reason == "cancelled"
            assert never.result.token_ids == []
            cancelled = await endless.wait()
            assert cancelled.finish_reason == "cancelled"
            assert cancelled.token_ids[0] == first.token_id
            assert len(cancelled.token_ids) < 240
            again = await server.submit(PROMPTS[0], max_new_tokens=12)
            assert (await again.wait()).token_ids == expected[0]

    run(work())


def test_rows_behind_a_cancelled_one_take_its_place(target: HFTarget) -> None:
    """Of three alike the first is cancelled; the last moves to where it was, in the same buffers."""
    decoder = make(target)
    prompts = [[token, 5, 9, 5, 9] for token in (1, 2, 3)]
    expected = [decoder.generate(prompt, max_new_tokens=30).token_ids for prompt in prompts]

    async def work() -> None:
        async with decoder.serve(max_rows=3) as server:
            streams = [await server.submit(prompt, max_new_tokens=30) for prompt in prompts]
            for stream in streams:
                await anext(stream)
            streams[0].cancel()
            results = [await stream.wait() for stream in streams]
            assert [result.token_ids for result in results[1:]] == expected[1:]
            assert results[0].finish_reason == "cancelled"

    run(work())


def test_handing_in_waits_where_the_queue_is_full(target: HFTarget) -> None:
    decoder = make(target)

    async def work() -> None:
        async with decoder.serve(max_rows=1, max_waiting=1) as server:
            long = await server.submit(PROMPTS[0], max_new_tokens=200)
            await anext(long)
            second = await server.submit(PROMPTS[1], max_new_tokens=2)
            third = asyncio.create_task(server.submit(PROMPTS[2], max_new_tokens=2))
            await anext(long)
            await anext(long)
            assert not third.done()
            long.cancel()
            assert (await (await third).wait()).finish_reason == "length"
            assert (await second.wait()).finish_reason == "length"

    run(work())


async def fill(server: Server) -> tuple[ServedStream, ServedStream, asyncio.Task[ServedStream]]:
    """One request that runs, one that waits, and one that cannot be handed in, where one of each may be."""
    running = await server.submit(PROMPTS[0], max_new_tokens=240)
    await anext(running)
    waiting = await server.submit(PROMPTS[1], max_new_tokens=2)
    blocked = asyncio.create_task(server.submit(PROMPTS[2], max_new_tokens=2))
    await asyncio.sleep(0)
    assert not blocked.done()
    return running, waiting, blocked


@pytest.mark.parametrize("end", ["leaving", "an exception", "another generation", "a failing pass"])
def test_who_waits_to_hand_in_learns_that_the_server_closes(
    target: HFTarget, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("the device is gone")

    decoder = make(target)
    blocked: list[asyncio.Task[ServedStream]] = []

    async def serve() -> None:
        async with decoder.serve(max_rows=1, max_waiting=1) as server:
            blocked.append((await fill(server))[2])
            if end == "an exception":
                raise KeyError
            if end == "another generation":
                decoder.generate(PROMPTS[3], max_new_tokens=1)
            if end == "a failing pass":
                monkeypatch.setattr(target, "forward_beside", fail)
            if end != "leaving":
                await asyncio.wait(blocked, timeout=10)  # within the block, which goes on

    async def work() -> None:
        raised = {"an exception": KeyError, "a failing pass": OSError}.get(end)
        with pytest.raises(raised) if raised else nullcontext():
            await serve()
        with pytest.raises(RuntimeError, match=r"closed while this request waited .* submit it there"):
            await asyncio.wait_for(blocked[0], 10)

    run(work(), seconds=10)


def test_cancelling_what_waits_lets_the_next_in(target: HFTarget) -> None:
    async def work() -> None:
        async with make(target).serve(max_rows=1, max_waiting=1) as server:
            running, waiting, blocked = await fill(server)
            waiting.cancel()
            third = await blocked
            assert len(running.result.token_ids) < 240  # nothing else made room
            assert (await waiting.wait()).finish_reason == "cancelled"
            running.cancel()
            assert (await third.wait()).finish_reason == "length"

    run(work(), seconds=10)


def test_who_waits_to_hand_in_may_give_up(target: HFTarget) -> None:
    async def work() -> None:
        async with make(target).serve(max_rows=1, max_waiting=1) as server:
            running, waiting, blocked = await fill(server)
            later = [asyncio.create_task(server.submit(PROMPTS[3], max_new_tokens=2)) for _ in range(2)]
            await asyncio.sleep(0)
            blocked.cancel()
            running.cancel()
            await running.wait()
            for task in later:
                assert (await (await task).wait()).finish_reason == "length"
            assert (await waiting.wait()).finish_reason == "length"
            assert blocked.cancelled()

    run(work(), seconds=10)


def test_who_gives_up_just_as_room_is_made_leaves_it_to_the_next(target: HFTarget) -> None:
    async def work() -> None:
        async with make(target).serve(max_rows=1, max_waiting=1) as server:
            running, waiting, blocked = await fill(server)
            server._drop(waiting._request)  # what the server does between passes
            blocked.cancel()  # it is let in, and cannot know yet
            await asyncio.wait([blocked])
            assert blocked.cancelled()
            last = await server.submit(PROMPTS[3], max_new_tokens=2)
            assert len(running.result.token_ids) < 240
            running.cancel()
            assert (await last.wait()).finish_reason == "length"

    run(work(), seconds=10)


def test_another_generation_ends_the_server(target: HFTarget) -> None:
    decoder = make(target)

    async def work() -> None:
        async with decoder.serve() as server:
            stream = await server.submit(PROMPTS[0], max_new_tokens=240)
            await anext(stream)
            assert len(decoder.generate(PROMPTS[1], max_new_tokens=5).token_ids) == 5
            assert (await stream.wait()).finish_reason == "cancelled"
            with pytest.raises(RuntimeError, match="the server is closed"):
                await server.submit(PROMPTS[0])

    run(work())


def test_what_cannot_be_served_is_refused_at_once(target: HFTarget) -> None:
    async def work() -> None:
        async with make(target).serve() as server:
            with pytest.raises(ValueError, match="the prompt is empty"):
                await server.submit([])
            with pytest.raises(ValueError, match="one completion, got n=2"):
                await server.submit(PROMPTS[0], n=2)
            with pytest.raises(ValueError, match="did you mean 'temperature'"):
                await server.submit(PROMPTS[0], temprature=1)
        tight = make(target, memory_budget="1MiB")
        async with tight.serve() as server:
            with pytest.raises(ValueError, match="Give more memory"):
                await server.submit([1] * 200, max_new_tokens=50)
        with pytest.raises(ValueError, match="max_rows must be at least 1"):
            make(target).serve(max_rows=0)

    run(work())


def test_an_exception_in_the_block_cancels_the_rest(target: HFTarget) -> None:
    streams: list[Any] = []

    async def leave() -> None:
        async with make(target).serve() as server:
            streams.append(await server.submit(PROMPTS[0], max_new_tokens=240))
            raise KeyError

    async def work() -> Any:
        with pytest.raises(KeyError):
            await leave()
        return await streams[0].wait()

    assert run(work()).finish_reason == "cancelled"


def test_clients_learn_of_a_failure(target: HFTarget) -> None:
    class Failing(NoneDrafter):
        features = ("no such state",)

    seen: list[str] = []

    async def work() -> None:
        async with make(target, Failing()).serve() as server:
            stream = await server.submit(PROMPTS[0])
            try:
                await stream.wait()
            except ValueError as error:
                seen.append(str(error))

    with pytest.raises(ValueError, match="unknown feature"):
        run(work())
    assert "unknown feature" in seen[0]


def test_a_prefix_is_kept_while_others_are_served(target: HFTarget) -> None:
    decoder = make(target)
    prefix = [(7 * n) % VOCAB for n in range(60)]
    prompts = [[*prefix, 4, 9, 4], [*prefix, 50]]
    expected = [decoder.generate(prompt, max_new_tokens=8).token_ids for prompt in prompts]

    async def work() -> None:
        async with decoder.serve(max_rows=3) as server:
            other = await server.submit(PROMPTS[0], max_new_tokens=200)
            await anext(other)
            with decoder.prefix(prefix):
                streams = [await server.submit(prompt, max_new_tokens=8) for prompt in prompts]
                assert [(await stream.wait()).token_ids for stream in streams] == expected
                with pytest.raises(ValueError, match="is in use"):
                    decoder.prefixes.evict(prefix)
            decoder.prefixes.evict(prefix)
            other.cancel()

    run(work())
    assert computed(target, lambda: decoder.generate(prompts[0], max_new_tokens=1)) > 60  # it is kept no longer


def computed(target: HFTarget, work: Any) -> int:
    """Tokens that the target computes meanwhile."""
    counts: list[int] = []
    embeddings = target.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _module, args, _out: counts.append(args[0].numel()))
    try:
        work()
    finally:
        hook.remove()
    return sum(counts)


FIELDS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.3, "top_p": 0.7, "seed": 8},
    {"temperature": 0.6, "top_k": 5, "min_p": 0.05, "seed": 9},
    {"repetition_penalty": 1.4},
]


@pytest.mark.parametrize("drafter", ["none", "ngram", "recycling"])
def test_requests_run_side_by_side_whatever_chooses_their_tokens(target: HFTarget, drafter: str) -> None:
    decoder = make(target, drafter)
    expected = [
        decoder.generate(prompt, max_new_tokens=40, **each).token_ids
        for prompt, each in zip(PROMPTS, FIELDS, strict=True)
    ]
    together: list[int] = []

    async def work() -> list[list[int]]:
        async with decoder.serve(max_rows=5) as server:
            streams = [
                await server.submit(prompt, max_new_tokens=40, **each)
                for prompt, each in zip(PROMPTS, FIELDS, strict=True)
            ]
            await anext(streams[0])
            together.append(len(server._running))
            return [(await stream.wait()).token_ids for stream in streams]

    assert run(work()) == expected
    assert together == [5]


def test_a_policy_that_needs_rows_alike_runs_them_in_turn(target: HFTarget) -> None:
    decoder = make(target, verifier="rejection")

    async def work() -> None:
        async with decoder.serve(max_rows=3) as server:
            fields: list[dict[str, Any]] = [{"temperature": 0.5}, {"temperature": 0.5}, {"temperature": 1.5}, {}]
            streams = [await server.submit([5, 9, 5], max_new_tokens=6, **each) for each in fields]
            await anext(streams[0])
            assert len(server._running) == 2
            results = [await stream.wait() for stream in streams]
            assert [len(result.token_ids) for result in results] == [6] * 4

    run(work())


def test_a_request_larger_than_memory_is_refused_and_others_go_on(target: HFTarget) -> None:
    decoder = make(target)
    decoder.generate(PROMPTS[0], max_new_tokens=20)
    assert decoder.memory_plan is not None
    tight = make(target, memory_budget=decoder.memory_plan.total + decoder.memory_plan.kv // 4)

    async def work() -> None:
        async with tight.serve(max_rows=4) as server:
            first = await server.submit(PROMPTS[0], max_new_tokens=20)
            with pytest.raises(ValueError, match=r"are needed and .* may be used"):
                await server.submit(PROMPTS[1], max_new_tokens=240)
            assert (await first.wait()).finish_reason == "length"

    run(work())


def test_where_memory_was_taken_meanwhile_the_request_learns_of_it(
    target: HFTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = make(target)
    expected = decoder.generate(PROMPTS[1], max_new_tokens=6).token_ids

    async def work() -> None:
        async with decoder.serve(max_rows=4) as server:
            lost = await server.submit(PROMPTS[0], max_new_tokens=200)
            with monkeypatch.context() as patched:
                patched.setattr("specdec.call_memory.free_bytes", lambda device: 1)
                with pytest.raises(ValueError, match="may be used"):
                    await lost.wait()
            assert lost.result.finish_reason == "error"
            assert (await (await server.submit(PROMPTS[1], max_new_tokens=6)).wait()).token_ids == expected

    run(work())

"""The peers' protocol, with a toy worker in place of an engine: nothing that a worker does can hang or confuse us."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from specdec.benchmarks.peers import (
    PEERS,
    EngineSpec,
    PeerDied,
    PeerError,
    PeerFailed,
    PeerMissing,
    PeerProcess,
    PeerReply,
    PeerTimeout,
    availability,
    engine_python,
    get_peer,
    prepare_weights,
    worker_command,
)
from specdec.benchmarks.peers.gguf_convert import main_tensor_type
from specdec.benchmarks.peers.install import RECIPES, main
from specdec.benchmarks.peers.process import WORKER_FOLDER
from specdec.benchmarks.peers.registry import ENGINES

# The toy counts on from the prompt's last token. Some prompts make it misbehave; `{body}` is run before it is ready.
TOY = """
import os, subprocess, sys, time
sys.path.insert(0, {workers!r})
from _protocol import Clock, cut_at_eos, serve

class Toy:
    version = "toy 1"
    notes = ["only a toy"]
    def __init__(self, options):
        {body}
    def generate(self, request):
        clock, first = Clock(), request.prompt_ids[-1]
        if first == 666:
            raise RuntimeError("the toy broke")
        if first == 777:
            time.sleep(60)
        if first == 888:
            os._exit(3)
        clock.arrived(2)
        clock.arrived(request.max_new_tokens - 2)
        tokens = list(range(first + 1, first + 1 + request.max_new_tokens))
        return clock.reply(cut_at_eos(tokens, request), drafted=9, accepted=7)

serve(Toy)
"""
OPTIONS = ["--weights", "none", "--threads", "1", "--precision", "fp32"]
MakePeer = Callable[..., PeerProcess]


@pytest.fixture
def make_peer(tmp_path: Path) -> Iterator[MakePeer]:
    """A function that makes a toy peer; whatever it made is gone after the test."""
    made: list[PeerProcess] = []

    def make(body: str = "pass", script: str = TOY, **limits: float) -> PeerProcess:
        path = tmp_path / f"toy{len(made)}.py"
        path.write_text(
            script.format(workers=str(WORKER_FOLDER), body=body) if script is TOY else textwrap.dedent(script)
        )
        command = [sys.executable, "-E", "-s", str(path), *OPTIONS]
        peer = PeerProcess(command, name="toy", log_path=tmp_path / "logs" / "toy.log", **limits)
        made.append(peer)
        return peer

    yield make
    for peer in made:
        peer.kill()


def test_a_request_comes_back_as_a_reply_with_its_timings(make_peer: MakePeer) -> None:
    peer = make_peer()
    hello = peer.start()
    assert (hello.version, hello.notes) == ("toy 1", ("only a toy",))
    assert hello.load_ms > 0
    reply = peer.generate([5, 6, 7], 6, eos_ids=[])
    assert reply.token_ids == (8, 9, 10, 11, 12, 13)
    assert reply.prompt_tokens == 3
    assert reply.prefill_ms >= 0
    assert reply.decode_ms >= 0
    assert (reply.first_tokens, reply.passes, reply.drafted, reply.accepted) == (2, 1, 9, 7)
    assert reply.tau == 4.0
    assert peer.generate([100], 3, eos_ids=[]).token_ids == (101, 102, 103)
    peer.close()
    assert not peer.running


def test_the_text_ends_with_the_end_token_unless_it_is_ignored(make_peer: MakePeer) -> None:
    with make_peer() as peer:
        assert peer.generate([7], 6, eos_ids=[40, 10]).token_ids == (8, 9, 10)
        assert peer.generate([7], 6, eos_ids=[10], ignore_eos=True).token_ids == (8, 9, 10, 11, 12, 13)


def test_an_error_reply_is_raised_and_the_worker_goes_on(make_peer: MakePeer) -> None:
    with make_peer() as peer:
        with pytest.raises(PeerFailed, match="toy failed: RuntimeError: the toy broke"):
            peer.generate([666], 4, eos_ids=[])
        with pytest.raises(PeerFailed, match="the prompt is empty"):
            peer.generate([], 4, eos_ids=[])
        assert peer.generate([1], 4, eos_ids=[]).token_ids == (2, 3, 4, 5)


def test_what_a_worker_prints_goes_to_the_log_and_not_into_the_protocol(make_peer: MakePeer) -> None:
    noise = """print("python noise")
        os.write(1, b"native noise\\n")
        subprocess.run(["echo", "child noise"])
        sys.stdout.flush()"""
    with make_peer(noise) as peer:
        assert peer.generate([1], 4, eos_ids=[]).token_ids == (2, 3, 4, 5)
    log = peer.log_path.read_text()
    assert all(f"{kind} noise" in log for kind in ("python", "native", "child"))


def test_a_worker_that_hangs_is_killed_with_what_it_started(make_peer: MakePeer, tmp_path: Path) -> None:
    child_file = tmp_path / "child"
    body = f"open({str(child_file)!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))"
    peer = make_peer(body, reply_timeout_s=0.5)
    peer.start()
    start = time.monotonic()
    with pytest.raises(PeerTimeout, match=r"toy did not reply within 0\.5 s and was killed"):
        peer.generate([777], 4, eos_ids=[])
    assert time.monotonic() - start < 10
    assert not peer.running
    assert not _alive(int(child_file.read_text()))
    with pytest.raises(PeerError, match="toy is not running"):
        peer.generate([1], 4, eos_ids=[])


def test_a_worker_that_never_reads_cannot_block_the_request(make_peer: MakePeer) -> None:
    deaf = """
    import time
    print('{"ready": true, "version": "deaf", "load_ms": 1.0}', flush=True)
    time.sleep(60)
    """
    peer = make_peer(script=deaf, reply_timeout_s=0.5)
    peer.start()
    with pytest.raises(PeerTimeout, match="did not reply"):
        peer.generate(list(range(100_000)), 4, eos_ids=[])


def test_a_busy_worker_does_not_outlive_a_parent_that_was_killed(tmp_path: Path) -> None:
    worker_file = tmp_path / "worker"
    toy = tmp_path / "toy.py"
    body = f"open({str(worker_file)!r}, 'w').write(str(os.getpid()))"
    toy.write_text(TOY.format(workers=str(WORKER_FOLDER), body=body))
    parent = f"""
    from pathlib import Path
    from specdec.benchmarks.peers import PeerProcess
    peer = PeerProcess({[sys.executable, str(toy), *OPTIONS]!r}, name="toy", log_path=Path({str(tmp_path / "log")!r}))
    peer.start()
    print("started", flush=True)
    peer.generate([777], 4, eos_ids=[])
    """
    command = [sys.executable, "-c", textwrap.dedent(parent)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"started\n"
        process.kill()
    assert not _alive(int(worker_file.read_text()))


def test_a_load_that_hangs_is_killed(make_peer: MakePeer) -> None:
    peer = make_peer("time.sleep(60)", start_timeout_s=0.5)
    with pytest.raises(PeerTimeout, match=r"did not load within 0\.5 s"):
        peer.start()
    assert not peer.running


def test_a_load_that_fails_says_why(make_peer: MakePeer) -> None:
    peer = make_peer("raise ValueError('no such precision')")
    with pytest.raises(PeerFailed, match="toy did not load: ValueError: no such precision"):
        peer.start()
    assert not peer.running


def test_a_worker_that_dies_leaves_the_end_of_its_log_in_the_message(make_peer: MakePeer) -> None:
    peer = make_peer("print('last words', flush=True)")
    peer.start()
    with pytest.raises(PeerDied, match=r"ended before it could reply; its log .*\n(.*\n)*.*last words"):
        peer.generate([888], 4, eos_ids=[])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "broke the protocol with the line 'not json'"),
        ('{"id": 9, "token_ids": []}', "answered request 9 in place of 1"),
        ('{"id": 1, "token_ids": [1.5]}', "token_ids must be a list of token ids"),
        (
            '{"id": 1, "token_ids": [1], "prompt_tokens": 8, "prefill_ms": 1, "decode_ms": 1, "first_tokens": 1}',
            "answered for 8 prompt tokens and 1 new ones where 1 and at most 4 were asked for",
        ),
    ],
)
def test_a_reply_that_breaks_the_protocol_ends_the_worker(make_peer: MakePeer, line: str, message: str) -> None:
    script = f"""
    import sys
    print('{{"ready": true, "version": "1", "load_ms": 1.0}}', flush=True)
    sys.stdin.readline()
    print({line!r}, flush=True)
    sys.stdin.readline()
    """
    peer = make_peer(script=script)
    peer.start()
    with pytest.raises(PeerDied, match=message):
        peer.generate([1], 4, eos_ids=[])
    assert not peer.running


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    peer = PeerProcess([str(tmp_path / "no-python")], name="toy", log_path=tmp_path / "log")
    with pytest.raises(PeerError, match=r"toy cannot be started with .*no-python"):
        peer.start()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prefill_ms", float("nan")),
        ("decode_ms", -1.0),
        ("prompt_tokens", True),
        ("first_tokens", 3),
        ("passes", "two"),
    ],
)
def test_an_impossible_reply_is_refused(field: str, value: object) -> None:
    message = {
        "token_ids": [1, 2],
        "prompt_tokens": 1,
        "prefill_ms": 1.0,
        "decode_ms": 1.0,
        "first_tokens": 1,
        field: value,
    }
    with pytest.raises(ValueError, match=field):
        PeerReply.from_message(message)


def test_a_missing_engine_is_told_in_one_sentence(tmp_path: Path) -> None:
    engine = EngineSpec("nosuch", "no_such_engine_module", "NoSuch")
    spec = dataclasses.replace(get_peer("vllm-bf16"), engine=engine)
    sentence = availability(spec, tmp_path)
    assert sentence is not None
    assert sentence.startswith("NoSuch is not installed: run `python -m specdec.benchmarks.peers.install")
    assert "\n" not in sentence
    with pytest.raises(PeerMissing, match="NoSuch is not installed"):
        engine_python(engine, tmp_path)


def test_an_engine_of_this_interpreter_is_found() -> None:
    engine = EngineSpec("json", "json", "json")
    assert engine_python(engine) == Path(sys.executable)
    assert availability(dataclasses.replace(get_peer("vllm-bf16"), engine=engine)) is None


def test_an_unknown_peer_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"unknown peer 'vllm-bf16-ngram'; did you mean .*vllm-bf16"):
        get_peer("vllm-bf16-ngram")


def test_every_peer_has_its_worker_its_recipe_and_a_command(tmp_path: Path) -> None:
    assert set(RECIPES) == set(ENGINES)
    for name, spec in PEERS.items():
        draft = tmp_path if spec.needs_draft_model else None
        command = worker_command(spec, tmp_path, python=Path(sys.executable), threads=2, draft_model=draft)
        assert name == spec.name
        assert all(Path(part).is_file() for part in command if part.endswith("_worker.py"))
        assert spec.engine.worker in command[4]


def test_a_draft_model_is_asked_for_and_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="transformers-bf16-assisted needs a draft model, got None"):
        worker_command(get_peer("transformers-bf16-assisted"), tmp_path, python=tmp_path, threads=2)
    with pytest.raises(ValueError, match="vllm-bf16 takes no draft model, got "):
        worker_command(get_peer("vllm-bf16"), tmp_path, python=tmp_path, threads=2, draft_model=tmp_path)
    with pytest.raises(ValueError, match="threads must be 1 or more, got 0"):
        worker_command(get_peer("vllm-bf16"), tmp_path, python=tmp_path, threads=0)


def test_missing_weights_are_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PeerMissing, match="transformers-bf16 needs a model folder"):
        prepare_weights(get_peer("transformers-bf16"), tmp_path)
    with pytest.raises(PeerMissing, match=r"needs config\.json and safetensors, which .* does not hold"):
        prepare_weights(get_peer("vllm-bf16"), tmp_path, model_folder=tmp_path)
    with pytest.raises(PeerMissing, match=r"llamacpp-q8_0 needs a GGUF file, and .*none\.gguf is none"):
        prepare_weights(get_peer("llamacpp-q8_0"), tmp_path, gguf_file=tmp_path / "none.gguf")


@pytest.mark.parametrize("precision", ["fp32", "f16", "bf16", "q8_0"])
def test_a_gguf_file_is_converted_once_with_its_metadata(tmp_path: Path, precision: str) -> None:
    source = tmp_path / "tiny.gguf"
    matrix = np.linspace(-1.0, 1.0, 4 * 64, dtype=np.float32).reshape(4, 64)
    uneven = np.linspace(-1.0, 1.0, 2 * 33, dtype=np.float32).reshape(2, 33)
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_float32("llama.rope.freq_base", 1e5)
    writer.add_tensor(
        "blk.0.w", gguf.quantize(matrix, gguf.GGMLQuantizationType.Q4_1), raw_dtype=gguf.GGMLQuantizationType.Q4_1
    )
    writer.add_tensor("blk.0.norm", matrix[0])
    writer.add_tensor("blk.0.uneven", uneven)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert prepare_weights(get_peer("llamacpp-q4_1"), tmp_path / "cache", gguf_file=source) == source
    spec = get_peer(f"llamacpp-{precision}")
    made = prepare_weights(spec, tmp_path / "cache", gguf_file=source)
    stamp = made.stat().st_mtime_ns
    assert prepare_weights(spec, tmp_path / "cache", gguf_file=source) == made
    assert made.stat().st_mtime_ns == stamp
    assert main_tensor_type(made) == precision

    reader = gguf.GGUFReader(made)
    tokens, base = reader.get_field("tokenizer.ggml.tokens"), reader.get_field("llama.rope.freq_base")
    assert tokens is not None
    assert base is not None
    assert (tokens.contents(), base.contents()) == (["a", "b"], 1e5)
    values = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    first = gguf.GGUFReader(source).tensors[0]
    dequantised = gguf.dequantize(first.data, first.tensor_type)
    # Half a step of each type: bf16 keeps 8 bits of a value, q8_0 steps by 1/127 of its block's largest.
    step = {"fp32": 0.0, "f16": 2**-11, "bf16": 2**-9, "q8_0": 0.51 / 127}[precision]
    np.testing.assert_allclose(values["blk.0.w"], dequantised, rtol=0, atol=step)
    np.testing.assert_array_equal(values["blk.0.norm"], matrix[0])
    np.testing.assert_allclose(values["blk.0.uneven"], uneven, rtol=0, atol=2**-9)


def test_a_converter_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    cache = tmp_path / "cache"
    with pytest.raises(PeerError, match=r"converter for the peer openvino-int8 failed"):
        prepare_weights(get_peer("openvino-int8"), cache, model_folder=model, python=Path(sys.executable))
    assert list(cache.iterdir()) == []


def test_a_dry_run_of_the_installer_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--peers-dir", str(tmp_path / "peers"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert all(engine in said for engine in ENGINES)
    assert not (tmp_path / "peers").exists()
    assert main(["--peers-dir", str(tmp_path), "vlm"]) == 1
    assert "did you mean 'vllm'" in capsys.readouterr().err


def _alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be collected does not count."""
    for _ in range(300):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True


def test_worker_messages_are_lines_of_json(make_peer: MakePeer) -> None:
    """What a worker in another language would have to write."""
    script = """
    import json, sys
    print(json.dumps({"ready": True, "version": "hand-made", "load_ms": 1.0, "notes": []}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        assert sorted(request) == ["eos_ids", "greedy", "id", "ignore_eos", "max_new_tokens", "prompt_ids"]
        reply = {"token_ids": [4], "prompt_tokens": 2, "prefill_ms": 1.0, "decode_ms": 0.0, "first_tokens": 1}
        print(json.dumps({"id": request["id"], **reply}), flush=True)
    """
    with make_peer(script=script) as peer:
        reply = peer.generate([1, 2], 1, eos_ids=[0])
    assert reply.token_ids == (4,)
    assert (reply.passes, reply.tau, reply.decode_tokens_per_s) == (None, None, None)
    assert json.loads(json.dumps(dataclasses.asdict(reply)))["prefill_ms"] == 1.0

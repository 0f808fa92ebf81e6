"""The comparison with peers as a whole, with toy workers in place of engines."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import specdec.models
from specdec.benchmarks import stage
from specdec.benchmarks.agreement import AgreementError
from specdec.benchmarks.contenders import OurRow, PeerRow, Sources, entrant_of, prepare_peers
from specdec.benchmarks.peer_bench import PeerProgress, run_peers
from specdec.benchmarks.peer_schema import PeersResult
from specdec.benchmarks.peer_settings import PeerSettings
from specdec.benchmarks.peers import DEFAULT_PEERS, PEERS, get_peer, quiet
from specdec.benchmarks.peers.process import WORKER_FOLDER
from specdec.benchmarks.questions import Question, QuestionSet
from specdec.benchmarks.settings import DrafterSpec
from specdec.benchmarks.tables import peers_table
from specdec.cli import main
from specdec.decoder import SpecDecoder
from specdec.target import HFTarget

ECHO = "row row row row your boat row row row row your boat row row"
QUESTIONS = QuestionSet(
    "tiny", "/home/someone/questions.jsonl", "ab" * 32,
    tuple(Question(number, "math", (f"{ECHO} {number}", "and then?")) for number in range(1, 5)),
)  # fmt: skip
NGRAM = DrafterSpec("ngram", "ngram")
# A worker without an engine: it counts on from the prompt's length. `{body}` runs before every answer but the warm-ups.
TOY = """
import os, sys, time
sys.path.insert(0, {workers!r})
from _protocol import Clock, serve

class Toy:
    version, notes = "toy 1", ["only a toy"]
    calls = -2
    def __init__(self, options):
        pass
    def generate(self, request):
        clock, call = Clock(), self.calls
        self.calls += 1
        if call >= 0:
            {body}
        clock.arrived(1)
        clock.arrived(request.max_new_tokens - 1)
        start = len(request.prompt_ids)
        return clock.reply(list(range(start, start + request.max_new_tokens)))

serve(Toy)
"""
MakePeer = Callable[..., PeerRow]
DIES_AT_THE_SECOND_QUESTION = "call == 1 and (print('out of luck in /opt/engine/lib.py', flush=True), os._exit(3))"


@pytest.fixture(autouse=True)
def little_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is waited for: toys do not spin."""
    monkeypatch.setattr(stage, "settle", lambda groups: set())


@pytest.fixture
def make_peer(tmp_path: Path) -> MakePeer:
    """A function that makes a peer of a name in the registry with a toy for its engine."""

    def make(name: str, body: str = "pass", **limits: float) -> PeerRow:
        path = tmp_path / f"{name}.py"
        path.write_text(TOY.format(workers=str(WORKER_FOLDER), body=body))
        command = [sys.executable, "-E", "-s", str(path), "--weights", "none", "--threads", "1", "--precision", "x"]
        return PeerRow(get_peer(name), command, tmp_path / "logs" / f"{name}.log", **limits)

    return make


def settings(**fields: Any) -> PeerSettings:
    values: dict[str, Any] = {"model": "tiny", "precisions": ("fp32",), "drafters": (NGRAM,)}
    values |= {"max_new_tokens": 8, "threads": 1}
    return PeerSettings(**values | fields)


def test_every_row_answers_every_question_in_rotated_order(
    target: HFTarget, tokenizer: Any, make_peer: MakePeer, tmp_path: Path
) -> None:
    out, seen = tmp_path / "out.json", list[tuple[int, int]]()

    def note(progress: PeerProgress) -> None:
        seen.append((len(progress.runs), progress.total))

    peers = [make_peer("transformers-fp32"), make_peer("llamacpp-q4_1")]
    skipped = [dataclasses.replace(entrant_of(get_peer("vllm-bf16")), skipped="vLLM is not installed: run `this`.")]
    command = ["specdec", "bench", "peers"]
    result = run_peers(
        {"fp32": target}, tokenizer, peers, skipped, settings(), QUESTIONS, out=out, progress=note,
        command=command,
    )  # fmt: skip
    names = ["specdec-fp32", "specdec-fp32-ngram", "transformers-fp32", "llamacpp-q4_1"]
    orders = [[run.name for run in result.runs if run.question_id == number] for number in (1, 2, 3, 4)]
    assert orders == [[*names[start:], *names[:start]] for start in range(4)]
    assert seen == [(number, 16) for number in range(1, 17)]
    assert all(run.new_tokens == 8 for run in result.runs)
    assert not any(peer.group for peer in peers)

    found = {figures.name: figures for figures in result.peers}
    assert [*found] == [*names, "vllm-bf16"]
    assert found["specdec-fp32-ngram"].equal_to_plain == 4
    assert found["transformers-fp32"].equal_to_plain == 0
    assert found["llamacpp-q4_1"].equal_to_plain is None
    assert (found["transformers-fp32"].version, found["transformers-fp32"].notes) == ("toy 1", ("only a toy",))
    assert result.settings["reference"] in names[:2]

    document = json.loads(out.read_text())
    assert document["command"] == command
    assert document["questions"]["source"] == "questions.jsonl"
    table = peers_table(document).splitlines()
    precisions = [line.split("|")[3].strip() for line in table[2:7]]
    assert precisions == ["fp32", "fp32", "fp32", "q4_1", "bf16"]
    assert r"- vllm-bf16: vLLM is not installed: run \`this\`." in table
    assert [path.name for path in tmp_path.glob("out*")] == ["out.json"]


def test_our_rows_are_timed_as_peers_are(target: HFTarget, tokenizer: Any) -> None:
    plain = OurRow("fp32", target, tokenizer, None)
    drafting = OurRow("fp32", target, tokenizer, NGRAM, adaptive=False)  # no clock decides on passes
    prompt = tokenizer(ECHO).input_ids
    for row in (plain, drafting):
        assert row.group is None
        row.load()
        assert row.group == quiet.OWN
    reply, drafted = plain.answer(prompt, 24, []), drafting.answer(prompt, 24, [])
    expected = SpecDecoder(target, "none").generate(prompt, max_new_tokens=24, ignore_eos=True)
    assert list(reply.token_ids) == list(drafted.token_ids) == expected.token_ids
    assert (reply.first_tokens, reply.passes, reply.tau, reply.drafted) == (1, 23, 1.0, None)
    assert drafted.passes is not None
    assert drafted.passes < 23
    assert drafted.drafted is not None
    assert drafted.tau == (24 - drafted.first_tokens) / drafted.passes


def test_a_peer_that_dies_is_recorded_and_the_rest_goes_on(
    target: HFTarget, tokenizer: Any, make_peer: MakePeer, tmp_path: Path
) -> None:
    said, out = list[str](), tmp_path / "out.json"
    peers = [
        make_peer("vllm-bf16", DIES_AT_THE_SECOND_QUESTION),
        make_peer("openvino-bf16", "time.sleep(60)", reply_timeout_s=1.0),
        make_peer("llamacpp-q4_1"),
    ]
    wanted = settings(drafters=())
    result = run_peers({"fp32": target}, tokenizer, peers, [], wanted, QUESTIONS, out=out, say=said.append)
    found = {figures.name: figures for figures in result.peers}
    assert {name: figures.num_runs for name, figures in found.items()} == {
        "specdec-fp32": 4, "vllm-bf16": 1, "openvino-bf16": 0, "llamacpp-q4_1": 4
    }  # fmt: skip
    died = found["vllm-bf16"].failed
    assert died is not None
    assert died.endswith("ends with out of luck in /opt/engine/lib.py")
    assert "\n" not in died
    assert found["vllm-bf16"].relative is not None
    assert "did not reply within 1 s" in (found["openvino-bf16"].skipped or "")
    assert any(text.startswith("vllm-bf16 is left out from here on: ") for text in said)
    text = out.read_text()
    assert "out of luck in lib.py" in text
    assert str(tmp_path) not in text
    assert "/opt" not in text
    assert "left out after 1 of 4 questions" in peers_table(json.loads(text))


def test_peers_come_and_go_where_there_is_no_room(
    target: HFTarget, tokenizer: Any, make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    peers = [make_peer("vllm-bf16"), make_peer("llamacpp-q4_1"), make_peer("openvino-int8")]
    wanted, questions = settings(drafters=(), block=2, loaded=1), QUESTIONS.limit(3)
    result = run_peers({"fp32": target}, tokenizer, peers, [], wanted, questions, say=said.append)
    names = ["specdec-fp32", "vllm-bf16", "llamacpp-q4_1", "openvino-int8"]
    assert [(run.name, run.question_id) for run in result.runs] == [
        *((name, number) for name in names for number in (1, 2)), *((name, 3) for name in [*names[1:], names[0]])
    ]  # fmt: skip
    assert said == [f"loading {name}" for name in names[1:]] * 2
    monkeypatch.setattr(stage, "available_memory_bytes", lambda: 2**30)
    said.clear()
    run_peers({"fp32": target}, tokenizer, peers[:2], [], settings(drafters=()), questions.limit(2), say=said.append)
    assert said == ["loading vllm-bf16", "loading llamacpp-q4_1", "loading vllm-bf16", "loading llamacpp-q4_1"]


def test_wrong_text_of_ours_is_refused(
    target: HFTarget, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer = OurRow.answer

    def wrong(row: OurRow, *arguments: Any) -> Any:
        reply = answer(row, *arguments)
        *ids, last = reply.token_ids
        planted = dataclasses.replace(reply, token_ids=(*ids, (last + 1) % 256))
        return reply if row.entrant.speculation == "none" else planted

    monkeypatch.setattr(OurRow, "answer", wrong)
    with pytest.raises(AgreementError, match="drafter 'specdec-fp32-ngram', question 1, turn 1, new token 7"):
        run_peers({"fp32": target}, tokenizer, [], [], settings(), QUESTIONS, out=tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


KILLED = """
import sys, time
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer
sys.path.insert(0, {here!r})
import test_peer_bench as t
folder, out, toy = sys.argv[1:]
def progress(now):
    if len(now.runs) == 8:
        print("ready", flush=True)
        time.sleep(600)
peer = t.PeerRow(t.get_peer("llamacpp-q4_1"), [sys.executable, toy, *"--weights x --threads 1 --precision x".split()],
                 Path(out).with_name("log"))
target = t.HFTarget(AutoModelForCausalLM.from_pretrained(folder))
t.run_peers({{"fp32": target}}, AutoTokenizer.from_pretrained(folder), [peer], [], t.settings(), t.QUESTIONS,
            out=Path(out), progress=progress)
"""


def test_a_run_goes_on_after_kill_9(
    target: HFTarget, tokenizer: Any, make_peer: MakePeer, model_folder: Path, tmp_path: Path
) -> None:
    out, partial = tmp_path / "out.json", tmp_path / "out.json.partial.jsonl"
    peer = make_peer("llamacpp-q4_1", DIES_AT_THE_SECOND_QUESTION)
    script = KILLED.format(here=str(Path(__file__).parent))
    arguments = [sys.executable, "-c", script, str(model_folder), str(out), str(tmp_path / "llamacpp-q4_1.py")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=root, text=True) as process:
        assert process.stdout is not None
        while "ready" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    blocks = [json.loads(line) for line in partial.read_text().splitlines()[1:]]
    # Question 2 ended the peer: its block has two runs. Of question 3's, where the run was killed, nothing is kept.
    assert [len(block["runs"]) for block in blocks] == [3, 2, 2]

    def run(**fields: Any) -> PeersResult:
        return run_peers({"fp32": target}, tokenizer, [peer], [], settings(**fields), QUESTIONS, out=out, resume=True)

    with pytest.raises(ValueError, match="holds an interrupted run"):
        run_peers({"fp32": target}, tokenizer, [peer], [], settings(), QUESTIONS, out=out)
    with pytest.raises(ValueError, match=r"settings\.max_new_tokens: 8 before, 9 now"):
        run(max_new_tokens=9)
    result = run()
    assert result.resumed_after == [7]
    assert [run.question_id for run in result.runs] == [1, 1, 1, 2, 2, 3, 3, 4, 4]
    found = {figures.name: figures for figures in result.peers}
    assert found["llamacpp-q4_1"].failed is not None
    assert found["llamacpp-q4_1"].version == "toy 1"
    assert not partial.exists()


def test_what_cannot_run_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm = get_peer("vllm-bf16")
    engine = dataclasses.replace(vllm.engine, module="no_such_engine_module")
    monkeypatch.setattr(
        "specdec.benchmarks.contenders.get_peer",
        lambda name: dataclasses.replace(vllm, engine=engine) if name == "vllm-bf16" else get_peer(name),
    )
    names = ["vllm-bf16", "transformers-bf16-assisted", "transformers-bf16"]
    ready, skipped = prepare_peers(names, Sources(tmp_path), threads=1, max_context=64)
    assert ready == []
    assert [entrant.precision for entrant in skipped] == ["bf16"] * 3
    reasons = [entrant.skipped for entrant in skipped]
    assert reasons[0] == engine.install_sentence
    assert reasons[1] == "the peer transformers-bf16-assisted needs a draft model: give its folder with --draft-model"
    assert "transformers-bf16 needs a model folder" in str(reasons[2])


def test_settings_are_checked(target: HFTarget, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        settings(block=0)
    with pytest.raises(ValueError, match="peer 'vllm-bf16' is there twice"):
        settings(peers=("vllm-bf16", "vllm-bf16"))
    with pytest.raises(ValueError, match="drafter 'none' is there twice"):
        settings(drafters=(DrafterSpec("none", "none"),))
    for wanted, message in (
        (settings(reference="specdec-fp32-ngrm"), "unknown reference .*did you mean 'specdec-fp32-ngram'"),
        (settings(max_new_tokens=2040), "question 1 needs 21.. tokens, the model has room for 2048"),
    ):
        with pytest.raises(ValueError, match=message):
            run_peers({"fp32": target}, tokenizer, [], [], wanted, QUESTIONS)


@pytest.fixture
def invoke(target: HFTarget, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """``specdec bench peers`` on the tiny model, in this process, with the toy for every peer."""
    path = tmp_path / "questions.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"question_id": q.question_id, "category": q.category, "turns": q.turns})
            for q in QUESTIONS.questions
        )
    )
    loaded = specdec.models.LoadedModel(target.model, tokenizer, "tiny")
    monkeypatch.setattr(specdec.models, "load_model", lambda *_, **__: loaded)

    def run(*arguments: str) -> Result:
        fixed = ["bench", "peers", "-m", "tiny", "--questions", str(path), "-t", "8", "--dtype", "fp32", "-d", "ngram"]
        return CliRunner().invoke(main, [*fixed, "--cache-dir", str(tmp_path / "cache"), *arguments])

    return run


def test_the_command_names_precision_and_reference(
    invoke: Callable[..., Result], make_peer: MakePeer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    peer = make_peer("llamacpp-q4_1")
    monkeypatch.setattr("specdec.benchmarks.contenders._prepare", lambda *_: peer)
    out = tmp_path / "out.json"
    result = invoke("--peer", "llamacpp-q4_1", "--limit", "2", "--json", str(out), "--reference", "specdec-fp32")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()[:4]]
    assert rows[0][:4] == ["row", "engine", "precision", "speculation"]
    assert [row[0] for row in rows[1:]] == ["specdec-fp32", "specdec-fp32-ngram", "llamacpp-q4_1"]
    assert [row[3] for row in rows[1:3]] == ["fp32"] * 2
    assert rows[3][4] == "q4_1"
    assert "tokens per second of specdec-fp32, our reference row" in result.stdout
    assert "loading llamacpp-q4_1" in result.stderr
    assert "[1/6] question 1: specdec-fp32 " in result.stderr
    document = json.loads(out.read_text())
    assert (document["kind"], document["settings"]["threads"]) == ("peers", 1)
    assert str(tmp_path) not in out.read_text()


def test_the_list_has_every_peer_and_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(spec: Any, _: Path | None) -> str | None:
        return None if spec.engine.name == "transformers" else str(spec.engine.install_sentence)

    monkeypatch.setattr("specdec.benchmarks.peers.availability", missing)
    result = CliRunner().invoke(main, ["bench", "peers", "--list", "--peers-dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.stdout.splitlines()[1:]}
    assert [*lines] == [*PEERS]
    assert lines["transformers-fp32"].split() == ["transformers-fp32", "fp32", "none", "available"]
    assert lines["vllm-bf16-lookup"].split()[:4] == ["vllm-bf16-lookup", "bf16", "lookup", "yes"]
    assert "vLLM is not installed: run `python -m specdec.benchmarks.peers.install" in lines["vllm-bf16-lookup"]
    assert {PEERS[name].precision for name in DEFAULT_PEERS} == {"bf16", "q8_0", "q4_1", "int8", "int4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs --json"),
        (["--peer", "vllm-bf15"], "unknown peer 'vllm-bf15'; did you mean 'vllm-bf16'"),
        (["--dtype", "int3"], "unknown dtype 'int3' (choices: float32, fp32, bfloat16, bf16, float16, fp16)"),
        (["-d", "ngrm"], "unknown drafter 'ngrm'; did you mean 'ngram'"),
        (["--json", "/nowhere/out.json"], "there is no folder '/nowhere'"),
        (["--reference", "vllm-bf16"], "unknown reference 'vllm-bf16'"),
    ],
)
def test_the_command_names_what_cannot_be_served(
    invoke: Callable[..., Result], arguments: list[str], message: str
) -> None:
    result = invoke("--peer", "llamacpp-q4_1", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr

"""``specdec profile`` measures once, and says what it measured in words, JSON and a picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from tiny_chat import Invoke
from transformers import LlamaConfig, LlamaForCausalLM
from unit.recorded_graph import RecordingMaker

from specdec import SpecDecoder, latency
from specdec.drafters.model import ModelDrafter
from specdec.latency import LatencyCurve, LatencyKey
from specdec.panels import panels_run
from specdec.precisions import STORED_NAMES
from specdec.quantization import SCHEMES
from specdec.target import HFTarget
from specdec.training.method import create_method


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Few combinations, a cache of its own, and a count of measurements."""
    measured: list[int] = []
    measure = latency.measure_curve

    def count(target: object) -> LatencyCurve:
        measured.append(1)
        return measure(target, nodes=(1, 4), lengths=(2, 9), batches=(1, 2), rounds=1)  # type: ignore[arg-type]

    monkeypatch.setattr(latency, "measure_curve", count)
    monkeypatch.setattr(latency, "DEFAULT_FOLDER", tmp_path / "cache")
    return measured


def test_a_table_has_a_line_per_batch_and_length(invoke: Invoke, chat_folder: str) -> None:
    result = invoke("profile", "-m", chat_folder)
    assert result.exit_code == 0, result.output
    assert "n=1" in result.output
    assert "n=4" in result.output
    starts = [line.split()[:2] for line in result.output.splitlines() if line.strip()[:2] in ("1 ", "2 ")]
    assert starts == [["1", "2"], ["1", "9"], ["2", "2"], ["2", "9"]]
    assert "kept in" in result.output


def test_a_second_run_reads_what_the_first_one_kept(invoke: Invoke, chat_folder: str, small: list[int]) -> None:
    first, second = (json.loads(invoke("profile", "-m", chat_folder, "--json").stdout) for _ in range(2))
    assert first == second
    assert len(small) == 1
    invoke("profile", "-m", chat_folder, "--json", "--refresh")
    assert len(small) == 2
    invoke("profile", "-m", chat_folder, "--json", "--dtype", "bf16")
    assert len(small) == 3


def test_a_quantized_cache_has_a_profile_of_its_own(invoke: Invoke, chat_folder: str, small: list[int]) -> None:
    invoke("profile", "-m", chat_folder)
    result = invoke("profile", "-m", chat_folder, "--kv", "int4", "--json")
    assert len(small) == 2
    assert json.loads(result.stdout)["key"]["backend"].endswith("-kv4")
    decoder = SpecDecoder(chat_folder, "ngram", dtype="float32", kv="int4")
    assert latency.load_curve(LatencyKey.of(decoder.target)) is not None
    wrong = invoke("profile", "-m", chat_folder, "--kv", "int5")
    assert wrong.exit_code != 0
    assert "unknown precision of the KV cache 'int5'" in f"{wrong.output}{wrong.exception}"


COMMANDS: list[list[str]] = [["generate", "hi"], ["chat"], ["profile"], ["bench", "mt-bench"]]


@pytest.mark.parametrize("command", COMMANDS)
def test_captured_passes_can_be_asked_for_and_need_cuda(invoke: Invoke, chat_folder: str, command: list[str]) -> None:
    result = invoke(*command, "-m", chat_folder, "--device", "cpu", "--cuda-graphs")
    assert result.exit_code == 2
    assert "cuda_graphs=True needs a CUDA device, the model's is 'cpu'" in result.stderr


@pytest.mark.usefixtures("small")
def test_captured_passes_have_a_profile_of_their_own(
    invoke: Invoke, chat_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdec.graphs.find_maker", lambda device: RecordingMaker())
    keys = [
        json.loads(invoke("profile", "-m", chat_folder, "--json", wanted).stdout)["key"]
        for wanted in ("--cuda-graphs", "--no-cuda-graphs")
    ]
    assert [key["backend"].partition("-")[0] for key in keys] == ["GraphTarget", "HFTarget"]
    decoder = SpecDecoder(chat_folder, "ngram", dtype="float32", cuda_graphs=True)
    assert keys[0] == vars(LatencyKey.of(decoder.target))


@pytest.mark.parametrize("command", [["generate"], ["profile"], ["bench", "mt-bench"]])
def test_help_names_every_quantization(invoke: Invoke, command: list[str]) -> None:
    words = " ".join(invoke(*command, "--help").output.replace("-\n", "-").split())
    _, _, after = words.partition("--quantize NAME ")
    assert after.startswith(
        f"Linear layers in {', '.join(SCHEMES)}, or in a .gguf file's own blocks ({' or '.join(STORED_NAMES)})."
    )


def test_the_plot_is_an_svg_with_a_line_per_curve(invoke: Invoke, chat_folder: str, tmp_path: Path) -> None:
    path = tmp_path / "curve.svg"
    assert invoke("profile", "-m", chat_folder, "--plot", str(path)).exit_code == 0
    root = ElementTree.fromstring(path.read_text())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    words = "".join(root.itertext())
    for batch in (1, 2):
        for length in (2, 9):
            assert f"batch {batch}, {length} cached tokens" in words


def test_a_decoder_plans_by_the_profile_that_is_kept(invoke: Invoke, chat_folder: str) -> None:
    invoke("profile", "-m", chat_folder)
    decoder = SpecDecoder(chat_folder, "ngram", dtype="float32")
    decoder.generate([1, 2, 1, 2], max_new_tokens=4)
    assert decoder._times is not None
    kept = latency.load_curve(LatencyKey.of(decoder.target))
    assert kept is not None
    assert decoder._times._curve == kept


@pytest.fixture(scope="module", params=[0, 64])
def draft(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Folders of a target in bfloat16 and of a draft model of its layers, which shares its head or has rows of it."""
    folder = tmp_path_factory.mktemp("made_to_order")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=256, head_dim=32, num_hidden_layers=3, max_position_embeddings=256, **sizes)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(folder / "target")
    method = create_method("model", HFTarget(model), {"layers": 2, "vocab_size": request.param})
    method.prepare(torch.ones(256))
    method.save(folder / "draft", {"target": str(folder / "target")})
    return str(folder / "target"), str(folder / "draft")


@pytest.mark.parametrize("options", [{}, {"dtype": "fp32"}, {"quantize": "w8a8"}, {"quantize": "int4"}], ids=str)
def test_a_draft_model_is_measured_as_it_drafts(
    invoke: Invoke, draft: tuple[str, str], options: dict[str, str]
) -> None:
    """The commands that the drafter asks for write what it reads, and then it plans."""
    target, folder = draft
    drafter_options = {"model": folder, "depth": 0}
    with pytest.warns(RuntimeWarning, match="goes by profiles that are not there") as warned:
        decoder = SpecDecoder(target, "model", drafter_options=drafter_options, **options)  # type: ignore[arg-type]
    assert isinstance(decoder.drafter, ModelDrafter)
    wanted = [LatencyKey.of(decoder.target), LatencyKey.of(decoder.drafter.draft_model)]
    if not options:
        assert wanted[1].precision == ("bfloat16" if panels_run() else "float32")
    commands = str(warned[0].message).split("`")[1::2]
    assert len(commands) == 2
    for command, key in zip(commands, wanted, strict=True):
        words = [target if word == "TARGET" else word for word in command.split()]
        quantized = ["--quantize", options["quantize"]] if "quantize" in options else []
        result = invoke(*words[1:], *quantized, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["key"] == vars(key)
    SpecDecoder(target, "model", drafter_options=drafter_options, **options)  # type: ignore[arg-type]


def test_a_draft_model_is_measured_as_it_drafts_without_being_told_how(invoke: Invoke, draft: tuple[str, str]) -> None:
    target, folder = draft
    keys = [json.loads(invoke("profile", "-m", name, "--json").stdout)["key"] for name in (target, folder)]
    decoder = SpecDecoder(target, "model", drafter_options={"model": folder, "depth": 0})
    assert isinstance(decoder.drafter, ModelDrafter)
    assert keys == [vars(LatencyKey.of(model)) for model in (decoder.target, decoder.drafter.draft_model)]

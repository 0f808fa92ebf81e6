"""The target writes its own texts: repeatably, resumably, in the frame in which it is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from cli.tiny_chat import make_tokenizer

from specdec import SamplingParams
from specdec.benchmarks.questions import SHIPPED, load_questions
from specdec.prompts import encode_chat
from specdec.training.chat_format import find_user_turn, turn_end_ids
from specdec.training.corpus import make_texts
from specdec.training.data import FilePrompts
from specdec.training.openings import OPENINGS
from specdec.training.sampler import BatchSampler, candidates
from specdec.training.synthesis import SynthesisSettings, decode
from specdec.training.texts import TrainingText, normalised
from training.toy import chat_target

FAST = SynthesisSettings(batch_size=6, prompt_tokens=24, reply_tokens=20, sampled_every=2)
TARGET, TOKENIZER = chat_target()


def written(folder: Path, tokens: int, settings: SynthesisSettings = FAST) -> list[TrainingText]:
    return make_texts(TARGET, TOKENIZER, folder, settings, tokens).texts


def test_the_frame_of_a_user_turn_is_read_off_the_template() -> None:
    turn = find_user_turn(TOKENIZER)
    assert turn is not None
    assert turn.header == "<|user|>"
    assert turn.stop_ids == {TOKENIZER.eos_token_id}
    assert turn_end_ids(TOKENIZER) == [TOKENIZER.eos_token_id]
    plain = make_tokenizer("{% for m in messages %}Q: {{ m.content }}\nA:{% endfor %}")
    turn = find_user_turn(plain)
    assert turn is not None
    assert (turn.header, turn.stop_ids, turn.stop_text) == ("Q: ", frozenset(), "A:")
    with pytest.raises(ValueError, match="does not render the user's message"):
        find_user_turn(make_tokenizer("always the same"))
    with pytest.raises(ValueError, match="template fails on a single user message"):
        find_user_turn(make_tokenizer("{{ raise_exception('system first') }}"))
    assert find_user_turn(make_tokenizer(None)) is None


def test_prompts_are_chats_as_in_use_and_replies_the_targets_own(tmp_path: Path) -> None:
    texts = written(tmp_path, 150)
    assert sum(len(text.reply_ids) for text in texts) >= 150
    openings = 0
    for text in texts:
        words = TOKENIZER.decode(text.prompt_ids).removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
        assert list(text.prompt_ids) == encode_chat([{"role": "user", "content": words}], TOKENIZER)
        openings += words.startswith(OPENINGS)
    assert 0 < openings < len(texts)
    first = texts[0]  # of round 0, whose replies are greedy
    greedy = decode(TARGET, [first.prompt_ids], SamplingParams(max_new_tokens=20), 0.0, 0)[0].token_ids
    assert greedy[: len(first.reply_ids)] == list(first.reply_ids)


def test_the_highest_scores_are_found_without_sorting_the_vocabulary() -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 16 * 300 + 7) * 4
    logits[1, -3], logits[8, 5] = 50.0, torch.nan
    best, ids, log_sums = candidates(logits, 0.7)
    expected = (logits[:8] / 0.7).topk(best.shape[1])
    torch.testing.assert_close(best[:8], expected.values)
    assert torch.equal(ids[:8], expected.indices)
    torch.testing.assert_close(log_sums[:8], (logits[:8] / 0.7).logsumexp(-1))
    assert log_sums[8].isnan()


def test_a_seed_gives_its_texts_and_an_interrupted_run_the_same(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", 90)
    written(tmp_path / "parts", 30)
    with (tmp_path / "parts" / "texts.jsonl").open("a") as file:
        file.write('{"prompt":[1,2')
    assert written(tmp_path / "parts", 90) == whole
    assert (tmp_path / "parts" / "texts.jsonl").read_text() == (tmp_path / "whole" / "texts.jsonl").read_text()
    assert written(tmp_path / "other", 90, replace(FAST, seed=1)) != whole


def test_a_cache_of_another_seed_is_refused(tmp_path: Path) -> None:
    written(tmp_path, 20)
    with pytest.raises(ValueError, match=r"settings\.seed: 0 before, 7 now"):
        written(tmp_path, 40, replace(FAST, seed=7))


def test_a_model_without_a_template_goes_on_from_plain_text_and_says_so(tmp_path: Path) -> None:
    target, tokenizer = chat_target(None)
    notes: list[str] = []
    store = make_texts(target, tokenizer, tmp_path, FAST, 60, note=notes.append)
    assert any("no chat template" in note for note in notes)
    assert store.num_reply_tokens >= 60
    bare: list[str] = []
    store = make_texts(target, None, tmp_path / "bare", FAST, 60, note=bare.append)
    assert bare == notes
    assert store.num_reply_tokens >= 60


def test_nothing_that_passes_ends_the_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no text passed the filters in 10 rounds of 6: .*reply too short"):
        written(tmp_path, 100, replace(FAST, reply_tokens=4))


def test_rows_left_over_are_cut_and_kept() -> None:
    prompts = [[1, 2], [3, 4], [5, 6], [7, 8]]
    params = SamplingParams(max_new_tokens=200, temperature=1.0)
    results = decode(TARGET, prompts, params, 0.5, 3)
    assert [result.finish_reason for result in results].count("cancelled") in (1, 2)
    assert all(result.token_ids for result in results)


def test_the_sampler_keeps_to_the_nucleus() -> None:
    params = SamplingParams(max_new_tokens=1, temperature=1.0, top_p=0.3)
    results = decode(TARGET, [[1, 2]] * 200, params, 0.0, 0)
    drawn = {result.token_ids[0] for result in results}
    with torch.inference_mode():
        probs = TARGET.model(torch.tensor([[1, 2]])).logits[0, -1].softmax(-1)
    best, ids = probs.sort(descending=True)
    nucleus = set(ids[: int((best.cumsum(0) < 0.3).sum()) + 1].tolist())
    assert drawn <= nucleus
    assert len(drawn) > len(nucleus) // 2
    with pytest.raises(ValueError, match="checks no drafts"):
        BatchSampler(0).accept(*_two_nodes())


def _two_nodes() -> tuple[object, ...]:
    from types import SimpleNamespace

    return SimpleNamespace(num_nodes=2), torch.zeros(1, 2, 5), None


def test_openings_are_many_different_and_no_question_of_ours() -> None:
    questions = [normalised(turn) for q in load_questions(SHIPPED).questions for turn in q.turns]
    assert len(set(OPENINGS)) == len(OPENINGS) >= 120
    for opening in OPENINGS:
        assert len(opening.split()) < 6 or not any(q.startswith(normalised(opening)) for q in questions), opening


def rows(*lines: object) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


GIVEN = "An answer that is long enough to be kept."


@pytest.mark.parametrize(
    ("line", "prompt", "reply"),
    [
        ({"prompt": "Why?"}, "<|user|>Why?<|end|><|assistant|>", None),
        (
            {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": GIVEN}]},
            "<|user|>Why?<|end|><|assistant|>",
            GIVEN + "<|end|>",
        ),
        (
            {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Why?"}]},
            "<|system|>Be kind.<|end|><|user|>Why?<|end|><|assistant|>",
            None,
        ),
        ({"text": "Some plain text."}, "S", "ome plain text."),
    ],
)
def test_data_comes_in_four_shapes(tmp_path: Path, line: object, prompt: str, reply: str | None) -> None:
    (tmp_path / "data.jsonl").write_text(rows(line))
    source = FilePrompts(tmp_path / "data.jsonl", TARGET, TOKENIZER, 4)
    found = source.round(0)
    assert found is not None
    assert source.round(1) is None
    assert [TOKENIZER.decode(item.prompt_ids) for item in found] == [prompt]
    assert [None if item.reply_ids is None else TOKENIZER.decode(item.reply_ids) for item in found] == [reply]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (rows({"prompt": "a"}) + "{", "line 2: Expecting property name"),
        (rows({"prompt": "a"}, {"question": "b"}), r"line 2: a line must be .*got the keys \['question'\]"),
        (rows([1]), "line 1: a line must be a JSON object"),
        (rows({"messages": [{"role": "user"}]}), "line 1: message 0 needs 'role' and 'content'"),
        (rows({"conversations": [{"from": "dog", "value": "wuff"}]}), "line 1: unknown speaker 'dog'"),
        (rows({"prompt": ""}), "line 1: the prompt is empty"),
        ("", "is empty: it needs a line"),
    ],
)
def test_bad_data_names_the_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        make_texts(TARGET, TOKENIZER, tmp_path / "c", FAST, 10, tmp_path / "data.jsonl")


def test_data_is_used_up_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(rows(*({"text": f"{n} different lines of text {n * n}"} for n in range(15))))
    notes: list[str] = []
    note: Callable[[str], None] = notes.append
    store = make_texts(TARGET, TOKENIZER, tmp_path / "c", FAST, 10**6, path, note=note)
    assert (len(store.texts), store.rounds) == (15, 3)
    path.write_text(rows(*({"prompt": f"What is {n}?"} for n in range(12))))
    settings = replace(FAST, sampled_every=1)  # greedy text of a random model loops
    store = make_texts(TARGET, TOKENIZER, tmp_path / "d", settings, 10**6, path)
    assert len(store.texts) + sum(store.dropped.values()) == 12
    assert len({text.prompt_ids for text in store.texts}) == len(store.texts) > 4
    assert any("fewer than the 1000000 asked for" in note for note in notes)
    assert store.origin["settings"] == asdict(settings)

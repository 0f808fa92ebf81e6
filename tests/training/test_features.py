"""Hidden states on disk: equal to a direct pass, checked, resumed; batches that are a function of their number."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from specdec.target import Feature, HFTarget
from specdec.training import shards
from specdec.training.dataset import TrainingSet, is_held_out
from specdec.training.features import compute_features, group_by_length, open_features, run_shard
from specdec.training.shards import num_covered, plan_shards
from specdec.training.texts import TrainingText
from training.toy import random_texts, tiny_target

NAMES: tuple[Feature, ...] = ("last", "pre_norm", 1)
TEXTS = random_texts(40)
MAX_LEN = 20


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return tiny_target()


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_TOKENS", 200)


@pytest.fixture
def folder(tmp_path: Path, target: HFTarget) -> Path:
    compute_features(target, TEXTS, tmp_path, NAMES, MAX_LEN, pass_tokens=64)
    return tmp_path


def direct(target: HFTarget, text: TrainingText) -> dict[Feature, torch.Tensor]:
    """transformers' own hidden states of a text, alone."""
    ids = torch.tensor([(*text.prompt_ids, *text.reply_ids)[:MAX_LEN]])
    with torch.inference_mode():
        out = target.model(ids, output_hidden_states=True, use_cache=False)
    # transformers puts the final norm into the last of the states
    return {"last": out.hidden_states[-1][0], 1: out.hidden_states[1][0]}


def test_features_equal_a_direct_pass(target: HFTarget, folder: Path) -> None:
    store = open_features(target, TEXTS, folder, MAX_LEN)
    store.check(NAMES)
    for index in (0, 7, 23, 39):
        for name, expected in direct(target, TEXTS[index]).items():
            torch.testing.assert_close(store.read(name, index), expected, rtol=1e-4, atol=1e-4)
    normed = target.model.model.norm(store.read("pre_norm", 7))
    torch.testing.assert_close(normed, store.read("last", 7), rtol=1e-4, atol=1e-4)


def test_only_what_is_missing_is_computed(
    target: HFTarget, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[int, tuple[Feature, ...]]] = []
    monkeypatch.setattr(
        "specdec.training.features.run_shard",
        lambda _t, _x, shard, names, _p: (
            asked.append((shard.index, tuple(names))) or run_shard(_t, _x, shard, names, _p)
        ),
    )
    compute_features(target, TEXTS, folder, NAMES, MAX_LEN)
    assert asked == []
    (folder / "last" / "00001.safetensors").unlink()
    shutil.rmtree(folder / "1")
    count = len(plan_shards(TEXTS, MAX_LEN))
    assert count > 2
    compute_features(target, TEXTS, folder, NAMES, MAX_LEN).check(NAMES)
    assert asked == [(index, ("last", 1) if index == 1 else (1,)) for index in range(count)]
    asked.clear()
    more = [*TEXTS, *random_texts(1, seed=9)]
    compute_features(target, more, folder, NAMES, MAX_LEN).check(NAMES)
    assert [index for index, _ in asked] == [count - 1], "texts appended change the last shard only"


def test_runs_on_fewer_texts_share_whole_shards() -> None:
    plan = plan_shards(TEXTS, MAX_LEN)
    covered = num_covered(plan, 3)
    assert covered == len(plan[0].lengths) >= 3
    assert plan_shards(TEXTS[:covered], MAX_LEN) == plan[:1]
    assert num_covered(plan, 0) == 0
    assert num_covered(plan, len(TEXTS)) == len(TEXTS)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_shards_are_refused_by_name(target: HFTarget, folder: Path, damage: str) -> None:
    path = folder / "last" / "00001.safetensors"
    data = bytearray(path.read_bytes())
    if damage == "missing":
        store = open_features(target, TEXTS, folder, MAX_LEN)
        path.unlink()
        with pytest.raises(ValueError, match=r"00001\.safetensors was not computed yet"):
            store.check(NAMES)
        return
    data[-1] ^= 1
    path.write_bytes(data if damage == "altered" else data[:-10])
    expected = "is altered" if damage == "altered" else rf"is truncated or altered \({len(data) - 10} bytes"
    with pytest.raises(ValueError, match=rf"00001\.safetensors {expected}.*delete it if it is there, then run"):
        compute_features(target, TEXTS, folder, NAMES, MAX_LEN).check(NAMES)
    path.unlink()
    compute_features(target, TEXTS, folder, NAMES, MAX_LEN).check(NAMES)


def test_features_of_another_target_are_refused(folder: Path) -> None:
    other = tiny_target()
    with torch.no_grad():
        other.model.get_input_embeddings().weight.mul_(2)
    with pytest.raises(ValueError, match=r"manifest\.json is of another target.*another cache folder"):
        compute_features(other, TEXTS, folder, NAMES, MAX_LEN)
    (folder / "last" / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*delete the folder"):
        compute_features(tiny_target(), TEXTS, folder, NAMES, MAX_LEN)


def test_a_disk_too_small_is_refused_before_and_a_full_one_when_it_is(
    target: HFTarget, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
        with pytest.raises(ValueError, match=r"hidden states need .* are free: make room"):
            compute_features(target, TEXTS, tmp_path / "a", NAMES, MAX_LEN)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(ValueError, match=r"00000\.safetensors: No space left on device; what was finished before"):
        compute_features(target, TEXTS, tmp_path / "b", NAMES, MAX_LEN)


def test_groups_keep_to_the_budget_and_lose_nothing() -> None:
    lengths = [5, 9, 1, 30, 8, 8, 2, 50]
    groups = group_by_length(lengths, 32)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 32
    assert len(groups) == 4


def test_the_split_is_a_function_of_the_text() -> None:
    texts = random_texts(400)
    held_out = {texts[i].key for i in TrainingSet(texts, None, ()).held_out}
    assert 5 <= len(held_out) <= 40
    fewer = TrainingSet(texts[100:300], None, ())
    assert {texts[100 + i].key for i in fewer.held_out} == held_out & {text.key for text in texts[100:300]}
    assert not set(fewer.held_out) & set(fewer.training)
    few = [text for text in texts if not is_held_out(text)][:3]
    assert len(TrainingSet(few, None, ()).held_out) == 1
    with pytest.raises(ValueError, match="1 of 1 texts have a reply within the first 512 tokens"):
        TrainingSet(few[:1], None, ())


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    texts = random_texts(300)

    def make(seed: int) -> TrainingSet:
        return TrainingSet(texts, None, (), batch_tokens=128, seed=seed)

    data, again = make(0), make(0)
    count = data.num_batches(0)
    backwards = {step: again.indices(step) for step in reversed(range(data.total_batches(2)))}
    assert [data.indices(step) for step in range(data.total_batches(2))] == [backwards[s] for s in sorted(backwards)]
    for epoch in (range(count), range(count, data.total_batches(2))):
        assert sorted(i for step in epoch for i in data.indices(step)) == sorted(data.training)
    assert data.indices(0) != data.indices(count)
    assert data.indices(0) != make(1).indices(0)


def test_a_batch_is_padded_and_says_what_is_trained(target: HFTarget, folder: Path) -> None:
    store = open_features(target, TEXTS, folder, MAX_LEN)
    data = TrainingSet(TEXTS, store, NAMES, max_len=MAX_LEN, batch_tokens=64)
    batch = data.batch(2)
    rows = data.indices(2)
    assert len(rows) > 1
    assert batch.tokens.shape[0] * batch.tokens.shape[1] <= 64
    for row, index in enumerate(rows):
        ids = (*TEXTS[index].prompt_ids, *TEXTS[index].reply_ids)[:MAX_LEN]
        length = len(ids)
        assert batch.tokens[row].tolist() == [*ids, *[0] * (batch.tokens.shape[1] - length)]
        assert (int(batch.lengths[row]), int(batch.prompt_lengths[row])) == (length, len(TEXTS[index].prompt_ids))
        assert torch.equal(batch.features["last"][row, :length], store.read("last", index))
        assert not batch.features["last"][row, length:].any()
        for ahead in (1, 2):
            goals = [t for t in range(length) if len(TEXTS[index].prompt_ids) <= t + ahead < length]
            assert batch.trained(ahead)[row].nonzero().flatten().tolist() == goals
            assert batch.ahead(ahead)[row, goals].tolist() == [ids[t + ahead] for t in goals]
    counts = data.token_counts(97)
    assert int(counts.sum()) == sum(len(TEXTS[i].reply_ids) for i in data.training)


def test_held_out_batches_are_the_same_and_as_many_as_asked() -> None:
    data = TrainingSet(random_texts(400), None, (), batch_tokens=64)
    all_tokens = sum(int(batch.lengths.sum()) for batch in data.held_out_batches())
    some = sum(int(batch.lengths.sum()) for batch in data.held_out_batches(40))
    assert 40 <= some < 40 + 29 < all_tokens
    first, again = (next(iter(data.held_out_batches())) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)

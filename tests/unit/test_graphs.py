"""Captured passes give what passes give that are not, however lengths, trees, rows and buffers change."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from integration.architectures import tiny_model
from torch import Tensor
from unit.recorded_graph import BrokenMaker, RecordingMaker, WrongMaker

from specdec import SpecDecoder
from specdec.graphs import BUCKETS, GraphTarget, bucket_of
from specdec.latency import LatencyKey, measure_curve
from specdec.target import HFTarget
from specdec.tree import TokenTree

BOUND = {"rtol": 1e-4, "atol": 1e-4}
"""Float32 sums in another order: masked slots are skipped in one pass and have weight 0 in the other."""


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def target(model: Any) -> GraphTarget:
    return GraphTarget(model, RecordingMaker())


def tree_of(rows: int, nodes: int, seed: int, vocab: int) -> TokenTree:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (rows, nodes), generator=generator)
    parents = torch.tensor([[-1] + [int(torch.randint(0, k, (), generator=generator)) for k in range(1, nodes)]] * rows)
    return TokenTree(tokens, parents)


@torch.inference_mode()
def outputs(target: HFTarget, features: tuple[Any, ...] = ()) -> list[Tensor]:
    """Logits and features of passes over trees of many sizes, some committed, rows of different lengths."""
    cache = target.new_cache(2, 40)
    target.extend([[5, 6, 7, 8], [9, 10]], cache)
    found = []
    for seed, nodes in enumerate((1, 3, 4, 3, 7, 1, 8, 2)):
        out = target.forward(tree_of(2, nodes, seed, target.vocab_size), cache, features)
        found += [out.logits, *out.features.values()]
        path = torch.tensor([[0, nodes - 1][: min(2, nodes)]] * 2)
        cache.commit(path, [1, min(2, nodes)])
    return found


@pytest.mark.parametrize(("nodes", "bucket"), [(1, 1), (2, 2), (3, 4), (33, 64), (64, 64), (65, None)])
def test_the_bucket_is_the_smallest_that_holds_the_tree(nodes: int, bucket: int | None) -> None:
    assert bucket_of(nodes) == bucket
    assert bucket_of(3, (7, 5)) == 5


def test_replays_give_what_eager_passes_give(model: Any, target: GraphTarget) -> None:
    features = (1, "pre_norm", "last")
    for mine, theirs in zip(outputs(target, features), outputs(HFTarget(model), features), strict=True):
        torch.testing.assert_close(mine, theirs, **BOUND)
    assert target.fallback is None
    assert target.replays == 8
    assert target.captures == 4  # buckets 1, 2, 4 and 8


def test_outputs_outlive_later_replays(target: GraphTarget) -> None:
    found = outputs(target)
    kept = [each.clone() for each in found]
    outputs(target)
    assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))


def test_later_calls_replay_what_earlier_ones_captured(target: GraphTarget) -> None:
    first = outputs(target)
    again = outputs(target)
    assert target.captures == 4
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_other_shapes_are_captured_anew(target: GraphTarget) -> None:
    with torch.inference_mode():
        cache = target.new_cache(2, 40)
        target.extend([[5, 6], [9]], cache)
        target.forward(tree_of(2, 4, 0, target.vocab_size), cache)
        target.forward(tree_of(2, 4, 0, target.vocab_size), cache, ("last",))
        assert target.captures == 2
        cache.keep_rows([1])
        target.forward(tree_of(1, 4, 0, target.vocab_size), cache)
        assert target.captures == 3
        cache.reserve(4 * cache.capacity)
        target.forward(tree_of(1, 4, 0, target.vocab_size), cache)
        assert target.captures == 4


def test_virtual_nodes_replay(model: Any, target: GraphTarget) -> None:
    width = model.config.hidden_size
    results = []
    for each in (target, HFTarget(model)):
        with torch.inference_mode():
            cache = each.new_cache(1, 40)
            each.extend([[5, 6, 7]], cache)
            for seed in range(3):
                torch.manual_seed(seed)
                plain = tree_of(1, 5, seed, each.vocab_size)
                virtual = torch.tensor([[False, False, True, False, True]])
                tree = TokenTree(plain.tokens, plain.parents, virtual, torch.randn(1, 5, width))
                results.append(each.forward(tree, cache).logits)
    for mine, theirs in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(mine, theirs, **BOUND)
    assert target.captures == 1


@pytest.mark.parametrize("drafter", ["none", "suffix"])
def test_texts_are_those_of_plain_targets(model: Any, target: GraphTarget, drafter: str) -> None:
    prompts = [[5, 6, 7, 5, 6, 7, 5], [9, 10], [11, 12, 11, 12], [13] * 6]
    fields: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0.7, "seed": 3}
    expected = SpecDecoder(model, drafter, adaptive=False).generate(prompts, **fields)
    decoder = SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise")
    for _ in range(2):
        found = decoder.generate(prompts, **fields)
        assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert target.replays > 0


def test_a_call_after_the_first_captures_nothing(target: GraphTarget) -> None:
    decoder = SpecDecoder(target, "ngram", adaptive=False)
    decoder.generate([5, 6, 7, 5, 6, 7], max_new_tokens=30, ignore_eos=True)
    captures = target.captures
    decoder.generate([5, 6, 7, 5, 6, 7], max_new_tokens=30, ignore_eos=True)
    assert 0 < captures == target.captures


def test_buffers_are_handed_out_again_once_their_cache_is_gone(target: GraphTarget) -> None:
    cache = target.new_cache(2, 40)
    pool = cache.pool  # type: ignore[attr-defined]
    other = target.new_cache(2, 40)
    assert other.pool is not pool  # type: ignore[attr-defined]
    del cache
    gc.collect()
    assert target.new_cache(1, 30).pool is pool  # type: ignore[attr-defined]


@torch.inference_mode()
def test_rows_come_and_go_as_in_any_cache(model: Any, target: GraphTarget) -> None:
    found = []
    for each in (target, HFTarget(model)):
        cache = each.new_cache(2, 40)
        each.extend([[5, 6, 7, 8], [9, 10]], cache)
        cache.add_rows(1)
        cache.copy_row(2, cache, 0, 3)
        cache.keep_rows([2, 1, 0, 1])
        cache.truncate([2, 2, 4, 1])
        cache.check_integrity()
        found.append(each.forward(tree_of(4, 3, 1, each.vocab_size), cache).logits)
    torch.testing.assert_close(found[0], found[1], **BOUND)


# What runs without a graph


def test_without_cuda_it_is_a_plain_target_and_says_so(model: Any) -> None:
    plain = GraphTarget(model)
    assert plain.fallback == "graphs need a CUDA device, the model is on cpu"
    for mine, theirs in zip(outputs(plain), outputs(HFTarget(model)), strict=True):
        assert torch.equal(mine, theirs)
    assert plain.replays == plain.captures == 0


def test_what_cannot_be_captured_runs_without_and_says_why(model: Any) -> None:
    broken = GraphTarget(model, BrokenMaker())
    with pytest.warns(RuntimeWarning, match="no stream to capture on; passes run without graphs"):
        found = outputs(broken)
    for mine, theirs in zip(found, outputs(HFTarget(model)), strict=True):
        torch.testing.assert_close(mine, theirs, **BOUND)
    assert "2 rows and 1 nodes could not be captured" in (broken.fallback or "")


def test_a_graph_that_gives_something_else_is_not_used(model: Any) -> None:
    wrong = GraphTarget(model, WrongMaker())
    with pytest.warns(RuntimeWarning, match="its replay differs from the pass it was recorded from by"):
        found = outputs(wrong)
    for mine, theirs in zip(found, outputs(HFTarget(model)), strict=True):
        torch.testing.assert_close(mine, theirs, **BOUND)
    assert wrong.replays == 0


def test_trees_beyond_the_largest_bucket_and_parts_of_trees_run_without(target: GraphTarget) -> None:
    with torch.inference_mode():
        cache = target.new_cache(1, 100)
        target.extend([[5, 6, 7]], cache)
        tree = tree_of(1, BUCKETS[-1] + 1, 0, target.vocab_size)
        target.forward(tree, cache)
        target.forward(tree_of(1, 6, 0, target.vocab_size), cache, first_node=3)
    assert target.captures == 0
    assert target.fallback is None


# As an option


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes on the CPU can be recorded."""
    monkeypatch.setattr("specdec.graphs.find_maker", lambda device: RecordingMaker())


@pytest.mark.usefixtures("recorded")
def test_the_option_captures_and_texts_stay_the_same(model: Any) -> None:
    decoder = SpecDecoder(model, "ngram", cuda_graphs=True, adaptive=False)
    assert isinstance(decoder.target, GraphTarget)
    assert decoder.target.captures == 1  # tried out before a call needs it
    prompt = [5, 6, 7, 5, 6, 7]
    found = decoder.generate(prompt, max_new_tokens=20)
    assert decoder.target.replays > 1
    for other in (None, False):
        plain = SpecDecoder(model, "ngram", cuda_graphs=other, adaptive=False)
        assert type(plain.target) is HFTarget
        assert plain.generate(prompt, max_new_tokens=20).token_ids == found.token_ids


@pytest.mark.usefixtures("recorded")
def test_captured_passes_are_profiled_under_a_key_of_their_own(model: Any) -> None:
    graphed, plain = (SpecDecoder(model, "none", cuda_graphs=wanted).target for wanted in (True, False))
    assert LatencyKey.of(graphed) != LatencyKey.of(plain)
    assert isinstance(graphed, GraphTarget)
    before = graphed.replays
    measure_curve(graphed, nodes=(1, 3), lengths=(4,), batches=(1,), rounds=1)
    assert graphed.replays == before + 4


def test_without_cuda_the_option_is_refused_before_a_model_is_looked_for(model: Any) -> None:
    said = r"cuda_graphs=True needs a CUDA device, the model's is 'cpu': load it with device='cuda', or leave"
    with pytest.raises(ValueError, match=said):
        SpecDecoder("no such model", cuda_graphs=True, device="cpu")
    with pytest.raises(ValueError, match=said):
        SpecDecoder(model, cuda_graphs=True)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_target_is_what_it_was_built_as(target: GraphTarget, wanted: bool) -> None:
    with pytest.raises(ValueError, match=rf"cuda_graphs={wanted} goes with a model; this is a GraphTarget already"):
        SpecDecoder(target, cuda_graphs=wanted)
    assert SpecDecoder(target, "none").target is target


@pytest.mark.usefixtures("recorded")
def test_the_option_and_a_quantized_cache_exclude_each_other(model: Any) -> None:
    for given in (model, "no such model"):
        with pytest.raises(ValueError, match="cuda_graphs=True and kv='int4': passes over a quantized cache are not"):
            SpecDecoder(given, cuda_graphs=True, kv="int4", device="cpu")


def test_a_model_whose_passes_cannot_be_captured_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.graphs.find_maker", lambda device: BrokenMaker())
    said = "cuda_graphs=True of LlamaForCausalLM: a pass of 1 rows and 1 nodes could not be captured: no stream"
    with pytest.raises(ValueError, match=said):
        SpecDecoder(model, cuda_graphs=True)

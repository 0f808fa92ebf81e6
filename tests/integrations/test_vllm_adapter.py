"""The vLLM proposer, over a stand-in for vLLM's scheduler: what a drafter sees does not depend on the schedule."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_runner import MAX_LEN, BareRunner, FakeRunner, make_config
from integration.architectures import VOCAB, tiny_model
from unit.unit_heads import random_weights

import specdec.integrations.vllm as plugin
from specdec import SpecDecoder
from specdec.drafters.eagle import make_eagle
from specdec.drafters.layer import LayerShape
from specdec.drafters.weights import DrafterWeights, TargetFacts, save_weights
from specdec.integrations.vllm import hooks
from specdec.integrations.vllm.chains import best_chain
from specdec.integrations.vllm.proposer import SpecdecProposer
from specdec.integrations.vllm.settings import Settings, chain_options
from specdec.registry import create_drafter
from specdec.target import HFTarget
from specdec.tree import PADDING, TokenTree

PROMPTS = {"a": [5, 6, 7, 8, 5, 6, 7, 8, 5], "b": [9, 3], "c": [40, 41, 42, 40, 41] * 4}
TRAINED = ["medusa", "clover", "eagle"]
K = 4
OPTIONS: dict[str, dict[str, Any]] = {"suffix": {"corpus_tokens": 0}}

Folder = Callable[[str], str]


@pytest.fixture(scope="module")
def target() -> HFTarget:
    """In float64, so that chunks of other sizes do not change what is best."""
    return HFTarget(tiny_model(initializer_range=0.15).double())


@pytest.fixture(scope="module")
def folder(target: HFTarget, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Folders of random weights, by drafter."""
    root = tmp_path_factory.mktemp("weights")
    for name in TRAINED:
        weights = _eagle(target) if name == "eagle" else random_weights(target, name)
        save_weights(root / name, weights, card="")
    return lambda name: str(root / name)


def _eagle(target: HFTarget) -> DrafterWeights:
    torch.manual_seed(1)
    shape = {"layer": asdict(LayerShape.of(target)), "states": [0, 1, "pre_norm"], "vocab_size": 0}
    module = make_eagle(shape)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return DrafterWeights("eagle", TargetFacts.of(target), shape, module.state_dict())


@pytest.fixture
def runner(target: HFTarget, folder: Folder) -> Callable[..., FakeRunner]:
    """A runner with a proposer of a drafter."""

    def make(
        name: str, cls: type[BareRunner] = FakeRunner, vocab_size: int = VOCAB, k: int = K, **options: Any
    ) -> BareRunner:
        options = {**OPTIONS.get(name, {}), **options}
        if name in TRAINED:
            options["weights"] = folder(name)
        config = make_config(vocab_size, k, {"drafter": name, "options": options})
        return cls(target, SpecdecProposer(config, runner_class=cls))

    return make


def alone(make: Callable[..., FakeRunner], name: str, **options: Any) -> FakeRunner:
    """Every request by itself, its prompt in one go: what the drafter does when nothing disturbs it."""
    run = make(name, **options)
    for request, prompt in PROMPTS.items():
        run.add(request, prompt)
        while not run.requests[request].done:
            run.run([request])
    assert run.drafter.off is None
    return run


def check_same(run: FakeRunner, undisturbed: FakeRunner) -> None:
    """Texts are equal, and so is every draft made after the same tokens."""
    assert run.drafter.off is None
    for name in PROMPTS:
        mine, other = run.requests[name], undisturbed.requests[name]
        length = min(len(mine.tokens), len(other.tokens))
        assert mine.tokens[:length] == other.tokens[:length]
        both = mine.proposed.keys() & other.proposed.keys()
        assert len(both) > 3
        assert {at: mine.proposed[at] for at in both} == {at: other.proposed[at] for at in both}
        assert any(mine.proposed[at] for at in both)


@pytest.mark.parametrize("name", ["ngram", "suffix", *TRAINED])
def test_chunks_batches_and_order_change_no_draft(runner: Callable[..., FakeRunner], name: str) -> None:
    undisturbed = alone(runner, name)
    run = runner(name)
    for request in ("c", "a"):
        run.add(request, PROMPTS[request])
    run.run(["c", "a"], chunk=3)
    run.run(["a", "c"], chunk=4)
    run.add("b", PROMPTS["b"])
    orders = [["b", "a", "c"], ["c", "b"], ["a"], ["a", "c", "b"]]
    for step in range(40):
        names = [n for n in orders[step % 4] if not run.requests[n].done]
        if names:
            run.run(names, chunk=5)
    check_same(run, undisturbed)


@pytest.mark.parametrize("name", ["ngram", "suffix", *TRAINED])
def test_preempted_requests_draft_as_if_they_had_not_been(runner: Callable[..., FakeRunner], name: str) -> None:
    undisturbed = alone(runner, name)
    run = runner(name)
    for request, prompt in PROMPTS.items():
        run.add(request, prompt)
    run.run(["a", "b", "c"], chunk=6)
    run.preempt("c")  # in the middle of its prompt
    for step in range(60):
        names = [n for n in PROMPTS if not run.requests[n].done]
        if step in (4, 9):
            run.preempt("a")
            run.preempt("b", cached=2)
        if names:
            run.run(names, chunk=7)
    check_same(run, undisturbed)


@pytest.mark.parametrize("name", ["ngram", "suffix", "recycling", *TRAINED])
def test_drafts_are_accepted_as_often_as_by_our_own_engine(
    runner: Callable[..., FakeRunner], target: HFTarget, folder: Folder, name: str
) -> None:
    run = runner(name)
    options = chain_options(name, OPTIONS.get(name, {}) | ({"weights": folder(name)} if name in TRAINED else {}), K)
    decoder = SpecDecoder(target, create_drafter(name, options), adaptive=False)
    for request, prompt in PROMPTS.items():
        run.add(request, prompt, max_tokens=20)
        while not run.requests[request].done:
            run.run([request])
        served = run.requests[request]
        # vLLM's prompt pass gives a token without a draft; our engine begins with that token.
        result = decoder.generate(served.tokens[: len(prompt) + 1], max_new_tokens=19, ignore_eos=True)
        assert [*served.tokens[: len(prompt) + 1], *result.token_ids] == served.tokens[: len(prompt) + 20]
        ours = result.stats.emitted - result.stats.passes
        assert served.accepted == ours
        run.drop(request)
    assert run.drafter.off is None


@pytest.mark.parametrize("name", TRAINED)
def test_states_that_a_prefix_cache_hides_cost_no_more_than_context(
    runner: Callable[..., FakeRunner], name: str
) -> None:
    undisturbed = alone(runner, name)
    run = runner(name)
    for request, prompt in PROMPTS.items():
        run.add(request, prompt)
        run.preempt(request, cached=len(prompt) - 1)
        while not run.requests[request].done:
            run.run([request])
        assert run.requests[request].tokens[:20] == undisturbed.requests[request].tokens[:20]
        assert any(run.requests[request].proposed.values())
    if name == "medusa":  # reads one state only
        check_same(run, undisturbed)
    assert run.drafter.off is None


@pytest.mark.parametrize("name", ["ngram", "suffix", "recycling", *TRAINED])
def test_steps_without_a_question_are_survived(runner: Callable[..., FakeRunner], name: str) -> None:
    undisturbed = alone(runner, name)
    run = runner(name)
    for request, prompt in PROMPTS.items():
        run.add(request, prompt)
    for step in range(60):
        names = [n for n in PROMPTS if not run.requests[n].done]
        if names:
            run.run(names, ask=step % 4 != 2)
    assert run.drafter.off is None
    if name in ("ngram", "suffix", "medusa"):  # the others lose context, or learn from what they do not see
        check_same(run, undisturbed)


def test_finished_and_cancelled_requests_are_forgotten(runner: Callable[..., FakeRunner]) -> None:
    run = runner("clover")
    for request, prompt in PROMPTS.items():
        run.add(request, prompt)
    run.run(["a", "b"])
    run.run(["c"], chunk=2)
    run.drop("a")
    run.drop("c")  # before its prompt was through
    run.run(["b"])
    assert run.drafter.num_requests == 1
    assert run.drafter.off is None


@pytest.mark.parametrize("name", ["suffix", "clover"])
def test_requests_whose_end_is_told_while_nothing_runs_are_forgotten(
    runner: Callable[..., FakeRunner], name: str
) -> None:
    run = runner(name)
    for request, prompt in PROMPTS.items():
        run.add(request, prompt)
        while not run.requests[request].done:
            run.run([request])
        run.drop(request)
        run.idle()
    run.add("next", PROMPTS["a"])
    run.run(["next"])
    assert run.drafter.num_requests == 1
    assert run.drafter.off is None


def test_what_a_drafter_learnt_from_a_text_serves_the_next(runner: Callable[..., FakeRunner]) -> None:
    run = runner("suffix", corpus_tokens=1000)
    for request in ("first", "second"):
        run.add(request, PROMPTS["b"])
        while not run.requests[request].done:
            run.run([request])
        run.drop(request)
        run.add("other", [50])
        run.run(["other"])
        run.drop("other")
    run.add("third", PROMPTS["b"])
    run.run(["third"])
    assert len(run.requests["third"].drafts) == K


def test_a_name_that_comes_back_with_another_text_starts_over(runner: Callable[..., FakeRunner]) -> None:
    undisturbed = alone(runner, "clover")
    run = runner("clover")
    run.add("a", [60, 61, 62])
    run.run(["a"])
    del run.requests["a"]  # vLLM says nothing
    for request, prompt in PROMPTS.items():
        run.add(request, prompt)
        while not run.requests[request].done:
            run.run([request])
    check_same(run, undisturbed)


@pytest.mark.parametrize("name", ["ngram", "suffix"])
def test_without_hooks_requests_are_told_apart_by_their_tokens(runner: Callable[..., FakeRunner], name: str) -> None:
    undisturbed = alone(runner, name)
    run = runner(name, cls=BareRunner)
    for request, prompt in PROMPTS.items():
        run.add(request, prompt)
    for step in range(40):
        names = [n for n in PROMPTS if not run.requests[n].done]
        if names:
            run.run(names[step % len(names) :] + names[: step % len(names)])
    check_same(run, undisturbed)


@pytest.mark.parametrize("name", ["recycling", *TRAINED])
def test_a_drafter_that_needs_a_hook_says_so(runner: Callable[..., FakeRunner], name: str) -> None:
    class Other:
        pass

    config = make_config(VOCAB, K, {"drafter": name})
    proposer = SpecdecProposer(config, runner_class=Other)
    run = runner(name)
    proposer._settings = run.drafter._settings
    with pytest.raises(ValueError, match=r"needs vLLM's .*propose_draft_token_ids"):
        proposer.bind(run.target, None)


@pytest.mark.parametrize("name", ["ngram", "medusa"])
def test_drafts_stay_within_k_the_vocabulary_and_the_request(runner: Callable[..., FakeRunner], name: str) -> None:
    run = runner(name, k=2, vocab_size=60)
    run.add("a", [5, 70, 6, 70, 6, 5, 70], max_tokens=6)
    while not run.requests["a"].done:
        run.run(["a"])
        request = run.requests["a"]
        left = len(request.tokens) - request.num_prompt_tokens
        assert len(request.drafts) <= max(0, min(2, 6 - left - 1))
        assert all(token < 60 for token in request.drafts)
    assert run.drafter.off is None


def test_the_context_ends_drafts_too(runner: Callable[..., FakeRunner]) -> None:
    run = runner("ngram")
    run.add("a", [5, 6] * 29, max_tokens=1000)
    while len(run.requests["a"].tokens) < MAX_LEN - 1:
        run.run(["a"])
        drafts = run.requests["a"].drafts
        assert not drafts or len(run.requests["a"].tokens) + len(drafts) < MAX_LEN  # the bonus token needs a place


def test_a_drafter_that_fails_is_switched_off_and_texts_go_on(
    runner: Callable[..., FakeRunner], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = alone(runner, "ngram")
    run = runner("ngram")
    run.add("a", PROMPTS["a"])
    run.run(["a"])

    def fail(*_: Any) -> TokenTree:
        raise RuntimeError("planted")

    monkeypatch.setattr("specdec.drafters.ngram.NgramDrafter.propose", fail)
    with caplog.at_level(logging.WARNING, "vllm.specdec"):
        while not run.requests["a"].done:
            run.run(["a"])
            assert run.requests["a"].drafts == []
    assert run.requests["a"].tokens[:29] == undisturbed.requests["a"].tokens[:29]
    assert run.drafter.off == "drafter 'ngram' failed with RuntimeError: planted"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_the_chain_follows_first_children_as_far_as_they_can_be_used() -> None:
    #       0 -> 1 -> 3 -> 5, 0 -> 2 -> 4; column 6 is padding
    tree = TokenTree(
        torch.tensor([[9, 10, 20, 11, 21, 12, 0]]), torch.tensor([[-1, 0, 0, 1, 2, 3, PADDING]])
    )  # fmt: skip
    assert best_chain(tree, 0, 10, 100) == [10, 11, 12]
    assert best_chain(tree, 0, 2, 100) == [10, 11]
    assert best_chain(tree, 0, 10, 12) == [10, 11]
    assert best_chain(tree, 0, 10, 11) == [10]
    assert best_chain(TokenTree.from_pending(torch.tensor([9])), 0, 10, 100) == []


def test_virtual_nodes_are_no_drafts() -> None:
    tree = TokenTree(
        torch.tensor([[9, 0, 10]]),
        torch.tensor([[-1, 0, 0]]),
        virtual=torch.tensor([[False, True, False]]),
        embeddings=torch.zeros(1, 3, 4),
    )
    assert best_chain(tree, 0, 10, 100) == [10]


def test_hooks_are_installed_once_and_missing_ones_named(caplog: pytest.LogCaptureFixture) -> None:
    before = FakeRunner.propose_draft_token_ids
    assert hooks.install(FakeRunner) == {hooks.STEPS, hooks.LOGITS, hooks.STATES}
    assert FakeRunner.propose_draft_token_ids is before

    class Old:
        def propose_draft_token_ids(self, sampled: Any) -> None: ...

        def sample_tokens(self) -> None: ...

    assert hooks.install(Old) == {hooks.LOGITS}
    assert [hooks.STEPS in record.getMessage() for record in caplog.records] == [True, False]
    assert [hooks.STATES in record.getMessage() for record in caplog.records] == [False, True]


def test_other_proposers_are_left_alone(target: HFTarget) -> None:
    class Runner(BareRunner):
        def __init__(self) -> None:
            self.drafter = types.SimpleNamespace()
            self.called = 0

        def propose_draft_token_ids(self, scheduler_output: Any, *, hidden_states: Any, aux_hidden_states: Any) -> int:
            self.called += 1
            return 7

        def _setup_eagle3_aux_hidden_state_outputs(self) -> None:
            self.called += 1

    hooks.install(Runner)
    run = Runner()
    assert run.propose_draft_token_ids(None, hidden_states=None, aux_hidden_states=None) == 7
    run._setup_eagle3_aux_hidden_state_outputs()
    assert run.called == 2


def test_register_is_silent_without_vllm_and_may_be_called_again(caplog: pytest.LogCaptureFixture) -> None:
    if "vllm" in sys.modules:
        pytest.skip("vLLM is loaded")
    plugin.register()
    plugin.register()
    assert not caplog.records


def test_register_says_once_what_an_old_vllm_lacks(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = types.ModuleType("vllm")
    old.__spec__ = types.SimpleNamespace(name="vllm")  # type: ignore[assignment]
    old.__version__ = "0.1"  # type: ignore[attr-defined]
    config = types.ModuleType("vllm.config")
    config.speculative = types.SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", old)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    monkeypatch.setattr(plugin, "_said", set())
    plugin.register()
    plugin.register()
    assert len(caplog.records) == 1
    assert "no speculative method custom_class" in caplog.text


def test_register_survives_a_vllm_it_does_not_know(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = types.ModuleType("vllm")
    broken.__spec__ = types.SimpleNamespace(name="vllm")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "vllm", broken)
    monkeypatch.setattr(plugin, "_said", set())
    plugin.register()
    assert "specdec's drafters are off" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"drafter": "ngrm"}, "did you mean 'ngram'"),
        ({"drafter": "ppd"}, "cannot run in vLLM: its prompt tokens"),
        ({"drafters": "ngram"}, "unknown setting .* did you mean 'drafter'"),
        ({"drafter": "ngram", "options": 3}, "options must be an object"),
        ([], "must be an object"),
    ],
)
def test_settings_that_cannot_be_served_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.read({"specdec": given})


def test_settings_survive_the_way_through_json() -> None:
    settings = Settings("medusa", {"weights": "folder"})
    assert Settings.read(settings.to_json()) == settings
    assert Settings.read({}) == Settings.read(None) == Settings()


def test_an_unknown_drafter_option_is_refused_when_the_target_is_there(runner: Callable[..., FakeRunner]) -> None:
    with pytest.raises(ValueError, match="dept"):
        runner("ngram", dept=3)


def test_options_given_by_the_user_stay() -> None:
    assert chain_options("medusa", {"depth": 2}, 4) == {"depth": 2, "width": 1, "branching": 1, "max_nodes": 5}


def test_the_entry_point_names_what_is_there() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"specdec": "specdec.integrations.vllm:register"}
    module, _, name = plugin.PROPOSER.rpartition(".")
    assert (module, name) == (SpecdecProposer.__module__, SpecdecProposer.__name__)

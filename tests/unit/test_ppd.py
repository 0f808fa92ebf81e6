"""The PPD drafter: what its prompt tokens see, what it makes of them, and that neither text nor cache knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from integration.architectures import VOCAB, tiny_model
from torch import Tensor

from specdec import SpecDecoder
from specdec.batch import Batch
from specdec.drafters import ppd as ppd_module
from specdec.drafters.ppd import PPDConfig, PPDDrafter, attached_chains
from specdec.drafters.weights import DrafterWeights, TargetFacts
from specdec.kv_cache import KVCache
from specdec.latency import LatencyCurve, LatencyKey
from specdec.target import HFTarget, TargetOutput
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict

PROMPTS = [[5, 6, 7, 8, 9] * 3, [30, 31], [9, 10, 11, 9, 10, 11, 9]]
RATES = [[0.4, 0.15, 0.1, 0.05], [0.3, 0.1, 0.05, 0.05], [0.2, 0.1, 0.05, 0.0]]
# Float64 rounding, 1e-16, of sums of some hundred products, through a few layers, of entries of order 10.
TOLERANCE = 1e-9


def make_weights(
    target: HFTarget, num_tokens: int = 3, ensembles: int = 1, hit_rates: Sequence[Sequence[float]] = ()
) -> DrafterWeights:
    """Prompt tokens at random."""
    size = int(target.config.hidden_size)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(num_tokens, ensembles, size, generator=generator) * 0.3
    shape = {"hidden_size": size, "num_tokens": num_tokens, "ensembles": ensembles}
    return DrafterWeights("ppd", TargetFacts.of(target), shape, {"embeddings": embeddings}, hit_rates=hit_rates)


class CheckedPPD(PPDDrafter):
    """Compares every pass, cache and guess with transformers' own passes over plain sequences."""

    target: HFTarget

    def __init__(self, *arguments: Any, caches: list[KVCache]) -> None:
        super().__init__(*arguments)
        self.caches = caches
        self.nodes = self.moved = self.ragged = 0
        self.attached: set[int] = set()

    def bind(self, target: HFTarget, tokenizer: Any | None) -> None:
        super().bind(target, tokenizer)
        self.target = target

    def reference(self, tokens: Sequence[int], prompt_tokens: Tensor) -> Tensor:
        """``[1 + n, V]`` logits after the tokens and after each of the embeddings ``[n, d]`` behind them."""
        embedded = self.target.model.get_input_embeddings()(torch.tensor([list(tokens)]))
        inputs = torch.cat([embedded, prompt_tokens.unsqueeze(0)], dim=1)
        logits: Tensor = self.target.model(inputs_embeds=inputs, use_cache=False).logits[0]
        return logits[len(tokens) - 1 :]

    def observe(self, batch: Batch, tree: TokenTree, output: TargetOutput, verdict: Verdict) -> None:
        super().observe(batch, tree, output, verdict)
        budget = self.config.max_nodes if self.plan is None else self.plan.budget
        assert tree.num_nodes <= budget
        cache = self.caches[-1]
        cache.check_integrity()
        self.ragged += len(set(verdict.num_accepted)) > 1
        for index, row in enumerate(batch.rows):
            for node in tree.valid[index].nonzero().squeeze(1).tolist():
                if not bool(tree.virtual is not None and tree.virtual[index, node]):
                    self.check_node(index, row.tokens, tree, output, node)
            count = verdict.num_accepted[index]
            path = verdict.path[index, : count + 1].tolist()
            self.moved += path != list(range(count + 1))
            committed = [*row.tokens, *verdict.tokens[index][:count]]
            self.check_guesses(index, committed)
            assert cache.row_lengths[index] == len(committed)
            fresh = self.target.new_cache(1, len(committed))
            self.target.extend([committed], fresh)
            for layer, buffers in cache.layers.items():
                for held, own in (
                    (buffers.keys, fresh.layers[layer].keys),
                    (buffers.values, fresh.layers[layer].values),
                ):
                    torch.testing.assert_close(held[index, :, : len(committed)], own[0], rtol=0, atol=TOLERANCE)

    def check_node(self, row: int, tokens: list[int], tree: TokenTree, output: TargetOutput, node: int) -> None:
        """A candidate's own logits and those of the prompt tokens below it."""
        above, path = node, []
        while above > 0:
            path.append(int(tree.tokens[row, above]))
            above = int(tree.parents[row, above])
        chains = attached_chains(tree, row, node)
        for member, chain in enumerate(chains or [[]]):
            expected = self.reference([*tokens, *reversed(path)], self.module.embeddings[: len(chain), member])
            got = output.logits[row, [node, *chain]]
            torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE)
            self.attached.add(len(chain))
        self.nodes += 1

    def check_guesses(self, row: int, tokens: list[int]) -> None:
        """What the next step drafts from: the prompt tokens after the last accepted node, averaged."""
        state = self._states[row]
        assert self._logits is not None
        members = [
            self.reference(tokens, self.module.embeddings[:state, member])[1:]
            for member in range(self.module.ensembles)
        ]
        expected = torch.stack(members).float().mean(0)
        torch.testing.assert_close(self._logits[row, :state], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("architecture", "ensembles", "rates"),
    [("llama", 1, ()), ("llama", 2, RATES), ("mistral", 1, RATES), ("gemma3_text", 2, ()), ("gpt2", 1, ())],
)
def test_passes_guesses_and_cache_are_those_of_plain_sequences(
    architecture: str, ensembles: int, rates: Sequence[Sequence[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = HFTarget(tiny_model(architecture).double())
    caches: list[KVCache] = []
    new_cache = target.new_cache

    def recorded(batch_size: int, capacity: int) -> KVCache:
        cache = new_cache(batch_size, capacity)
        if capacity > 64:  # not one of the fresh ones
            caches.append(cache)
        return cache

    monkeypatch.setattr(target, "new_cache", recorded)
    config = PPDConfig(max_nodes=20)
    drafter = CheckedPPD(config, make_weights(target, 3, ensembles, rates), caches=caches)
    plain = SpecDecoder(target, "none").generate(PROMPTS, max_new_tokens=16, ignore_eos=True)
    found = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False).generate(
        PROMPTS, max_new_tokens=16, ignore_eos=True
    )
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]
    assert drafter.nodes > 100
    assert drafter.attached >= {1, 2, 3}
    assert drafter.moved > 0, "no accepted node had to move"
    assert drafter.ragged > 0, "all rows accepted alike"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("tree", "rates", "ensembles"),
    [("confidence", (), 1), ("confidence", RATES, 2), ("calibrated", RATES, 1), ("calibrated", RATES, 3)],
)
def test_the_text_is_that_of_plain_decoding(
    tree: Any, rates: Sequence[Sequence[float]], ensembles: int, rows: int, temperature: float
) -> None:
    target = HFTarget(tiny_model("llama").double())
    fields = {"max_new_tokens": 25, "temperature": temperature, "seed": 3}
    plain = SpecDecoder(target, "none").generate(PROMPTS[:rows], **fields)
    drafter = PPDDrafter(PPDConfig(tree=tree), make_weights(target, 3, ensembles, rates))
    decoder = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False)
    found = decoder.generate(PROMPTS[:rows], **fields)
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]
    assert decoder.stats.drafted > 0


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 4, 5])
def test_the_end_of_a_text_cuts_trees_short(max_new_tokens: int) -> None:
    target = HFTarget(tiny_model("llama", max_position_embeddings=len(PROMPTS[0]) + max_new_tokens))
    prompts = PROMPTS[:2]
    plain = SpecDecoder(target, "none").generate(prompts, max_new_tokens=max_new_tokens, ignore_eos=True)
    decoder = SpecDecoder(target, PPDDrafter(weights=make_weights(target)), on_drafter_error="raise", adaptive=False)
    found = decoder.generate(prompts, max_new_tokens=max_new_tokens, ignore_eos=True)
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]


def test_rows_that_end_early_take_their_guesses_with_them() -> None:
    target = HFTarget(tiny_model("llama").double())
    whole = SpecDecoder(target, "none").generate(PROMPTS, max_new_tokens=30, ignore_eos=True)
    stops = [whole[0].token_ids[6], whole[2].token_ids[12]]
    plain = SpecDecoder(target, "none").generate(PROMPTS, max_new_tokens=30, ignore_eos=True, stop_token_ids=stops)
    assert len({len(result.token_ids) for result in plain}) > 1
    drafter = PPDDrafter(PPDConfig(max_nodes=24), make_weights(target, 3, 1, RATES))
    found = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False).generate(
        PROMPTS, max_new_tokens=30, ignore_eos=True, stop_token_ids=stops
    )
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]


@pytest.mark.parametrize("fields", [{"repetition_penalty": 1.3}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}])
def test_sampling_parameters_apply_to_guesses(fields: dict[str, Any]) -> None:
    target = HFTarget(tiny_model("llama").double())
    plain = SpecDecoder(target, "none").generate(PROMPTS, max_new_tokens=20, seed=1, **fields)
    decoder = SpecDecoder(target, PPDDrafter(weights=make_weights(target)), on_drafter_error="raise", adaptive=False)
    found = decoder.generate(PROMPTS, max_new_tokens=20, seed=1, **fields)
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]


def test_the_rejection_policy_is_served() -> None:
    target = HFTarget(tiny_model("llama").double())
    decoder = SpecDecoder(
        target, PPDDrafter(weights=make_weights(target)), verifier="rejection", on_drafter_error="raise", adaptive=False
    )
    decoder.generate(PROMPTS, max_new_tokens=40, temperature=1.0, seed=0)
    assert decoder.stats.drafted > 0


def test_a_perfect_guess_is_accepted_at_every_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The guesses replaced by the text itself: each pass but the first emits k + 1 tokens."""
    target = HFTarget(tiny_model("llama").double())
    whole = PROMPTS[0] + SpecDecoder(target, "none").generate(PROMPTS[0], max_new_tokens=41, ignore_eos=True).token_ids
    drafter = PPDDrafter(weights=make_weights(target))

    def oracle(batch: Batch) -> Any:
        following = whole[len(batch.rows[0].tokens) :][: drafter._states[0]]
        return [[[0.9, 0.05]] * len(following)], [[[token, 0] for token in following]]

    monkeypatch.setattr(drafter, "_guesses", oracle)
    decoder = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False)
    assert PROMPTS[0] + decoder.generate(PROMPTS[0], max_new_tokens=41, ignore_eos=True).token_ids == whole
    assert decoder.stats.passes == 11


def test_the_first_pass_is_the_root_and_its_prompt_tokens() -> None:
    target = HFTarget(tiny_model("llama"))
    seen: list[TokenTree] = []

    class Watched(PPDDrafter):
        def propose(self, batch: Batch) -> TokenTree:
            seen.append(super().propose(batch))
            return seen[-1]

    decoder = SpecDecoder(target, Watched(weights=make_weights(target, 3, 2)), adaptive=False)
    decoder.generate(PROMPTS[0], max_new_tokens=8)
    first = seen[0]
    assert first.parents.tolist() == [[-1, 0, 1, 2, 0, 4, 5]]
    assert first.virtual is not None
    assert first.virtual.tolist() == [[False] + [True] * 6]
    assert first.num_drafted.tolist() == [0]
    assert attached_chains(first, 0, 0) == [[1, 2, 3], [4, 5, 6]]
    assert int(seen[1].num_drafted[0]) > 0


@pytest.mark.parametrize("ensembles", [1, 3])
@pytest.mark.parametrize(("slope", "larger"), [(0.0001, True), (1.0, False)])
def test_a_profile_of_the_target_decides_the_budget(
    monkeypatch: pytest.MonkeyPatch, slope: float, larger: bool, ensembles: int
) -> None:
    target = HFTarget(tiny_model())
    curves = {LatencyKey.of(target): LatencyCurve.simple({n: 1.0 + slope * n for n in (1, 64)})}
    monkeypatch.setattr(ppd_module, "load_curve", curves.get)
    drafter = PPDDrafter(PPDConfig(max_nodes=24), make_weights(target, 3, ensembles, RATES))
    drafter.bind(target, None)
    assert drafter.plan is not None
    assert (drafter.plan.budget > 12) == larger
    assert 2 * ensembles + 2 <= drafter.plan.budget <= 24


def test_fewer_prompt_tokens_than_trained_and_a_budget_from_latency() -> None:
    target = HFTarget(tiny_model("llama"))
    weights = make_weights(target, 3, 1, RATES)
    drafter = PPDDrafter(PPDConfig(depth=2), weights, latency={6: 1.0, 12: 1.0, 40: 30.0})
    drafter.bind(target, None)
    assert drafter.plan is not None
    assert drafter.plan.budget == 12
    assert len(drafter.plan.trees) == 3
    assert drafter.expected_accepted((1, 11, 12, 64)) == [0.0, 0.0, *[drafter.plan.tau - 1.0] * 2]
    decoder = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False)
    plain = SpecDecoder(target, "none").generate(PROMPTS, max_new_tokens=12)
    assert [r.token_ids for r in decoder.generate(PROMPTS, max_new_tokens=12)] == [r.token_ids for r in plain]


def test_what_does_not_fit_is_refused() -> None:
    target = HFTarget(tiny_model("llama"))
    weights = make_weights(target)
    with pytest.raises(ValueError, match="no weights of drafter 'ppd' ship for this LlamaForCausalLM"):
        PPDDrafter().bind(target, None)
    with pytest.raises(ValueError, match="for another target: hidden_size 64, not 32"):
        PPDDrafter(weights=weights).bind(HFTarget(tiny_model("llama", hidden_size=32)), None)
    with pytest.raises(ValueError, match="have no hit rates: run specdec calibrate"):
        PPDDrafter(PPDConfig(tree="calibrated"), weights).bind(target, None)
    with pytest.raises(ValueError, match="have no hit rates: run specdec calibrate"):
        PPDDrafter(weights=weights, latency={8: 1.0}).bind(target, None)
    with pytest.raises(ValueError, match="max_nodes must be at least 9 with 4 embeddings per prompt token, got 8"):
        PPDDrafter(PPDConfig(max_nodes=8), make_weights(target, 3, 4)).bind(target, None)
    with pytest.raises(ValueError, match="a pass of 5 nodes has no room"):
        PPDDrafter(PPDConfig(max_nodes=5), make_weights(target, 3, 4, RATES)).bind(target, None)
    with pytest.raises(ValueError, match="max_nodes must be at least 4, got 3"):
        PPDConfig(max_nodes=3)
    assert target.vocab_size == VOCAB

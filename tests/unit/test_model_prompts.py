"""A draft model with prompt tokens: fewer passes of its own, the same text, and exact logits where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integration.architectures import tiny_model
from torch import Tensor

from specdec import SpecDecoder
from specdec.batch import Batch
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.drafters.model_prompts import LONGEST_CHAIN, DraftPrompts, Lookahead
from specdec.drafters.ppd import average
from specdec.drafters.weights import DrafterWeights, TargetFacts, save_weights
from specdec.target import HFTarget
from specdec.tree import TokenTree

PROMPTS = [[5, 6, 7, 8, 9] * 5, [30, 31], [9, 10, 11, 9, 10, 11, 9]]
TOLERANCE = 1e-4  # averages are in float32, logits of order 10


def write_prompts(folder: Path, model: Any, num_tokens: int = 2, ensembles: int = 1) -> str:
    """Random prompt tokens for a model, as a folder."""
    size = int(model.config.hidden_size)
    embeddings = torch.randn(num_tokens, ensembles, size, generator=torch.Generator().manual_seed(0)) * 0.3
    shape = {"hidden_size": size, "num_tokens": num_tokens, "ensembles": ensembles}
    facts = TargetFacts.of(HFTarget(model))
    save_weights(folder, DrafterWeights("ppd", facts, shape, {"embeddings": embeddings}), "card")
    return str(folder)


class Checked(ModelDrafter):
    """Compares every level's logits with transformers' own, and counts passes."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.exact = self.guessed = self.passes = 0
        forward = self.draft_model.forward

        def counted(*inputs: Any, **named: Any) -> Any:
            self.passes += 1
            return forward(*inputs, **named)

        self.draft_model.forward = counted  # type: ignore[method-assign]

    def reference(self, tokens: list[int], skipped: int) -> Tensor:
        """``[V]`` logits after tokens and the first ``skipped`` prompt tokens, averaged."""
        assert self._prompts is not None
        model = self.draft_model.model
        embedded = model.get_input_embeddings()(torch.tensor([tokens]))
        flat = self._prompts._flat.view(self._prompts.ensembles, self._prompts.num_tokens, -1)
        members = [
            model(inputs_embeds=torch.cat([embedded, chain[None, :skipped]], dim=1), use_cache=False).logits[0, -1]
            for chain in flat
        ]
        return average(torch.stack(members), dim=0)

    def _levels(self, batch: Batch) -> Any:
        level_logits = super()._levels(batch)
        assert self._prompts is not None
        per_pass = self._prompts.num_tokens + 1

        def checked(tree: TokenTree, first: int, level: int) -> Tensor:
            logits = level_logits(tree, first, level)
            skipped = (level - 1) % per_pass
            for row, drafted in enumerate(batch.rows):
                for place, node in enumerate(range(first, tree.num_nodes)):
                    if not bool(tree.valid[row, node]):
                        continue
                    path, above = [], node
                    while above > 0:
                        path.append(int(tree.tokens[row, above]))
                        above = int(tree.parents[row, above])
                    known = [*drafted.tokens, *reversed(path)][: len(drafted.tokens) + level - 1 - skipped]
                    expected = self.reference(known, skipped)
                    torch.testing.assert_close(logits[row, place].float(), expected, rtol=0, atol=TOLERANCE)
                    self.exact += skipped == 0
                    self.guessed += skipped > 0
            return logits

        return checked


@pytest.mark.parametrize(("num_tokens", "ensembles"), [(1, 1), (2, 2), (3, 1)])
def test_levels_are_the_models_own_or_its_prompt_tokens(num_tokens: int, ensembles: int, tmp_path: Path) -> None:
    target, draft = tiny_model("llama", seed=0).double(), tiny_model("llama", seed=0).double()
    folder = write_prompts(tmp_path, draft, num_tokens, ensembles)
    drafter = Checked(ModelConfig(depth=5, beams=3, max_nodes=16, prompt_tokens=folder), draft)
    plain = SpecDecoder(target, "none").generate(PROMPTS, max_new_tokens=10, ignore_eos=True)
    decoder = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False)
    found = decoder.generate(PROMPTS, max_new_tokens=10, ignore_eos=True)
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]
    assert drafter.exact > 10
    assert drafter.guessed > 10
    assert decoder.stats.accepted > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_text_is_that_of_plain_decoding(rows: int, temperature: float, tmp_path: Path) -> None:
    target, draft = tiny_model("llama", seed=0).double(), tiny_model("llama", seed=1).double()
    fields: dict[str, Any] = {"max_new_tokens": 25, "temperature": temperature, "seed": 3}
    plain = SpecDecoder(target, "none").generate(PROMPTS[:rows], **fields)
    drafter = ModelDrafter(ModelConfig(prompt_tokens=write_prompts(tmp_path, draft), depth=7), draft)
    found = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False).generate(PROMPTS[:rows], **fields)
    assert [result.token_ids for result in found] == [result.token_ids for result in plain]


def test_drafting_takes_a_pass_for_k_plus_one_levels(tmp_path: Path) -> None:
    target, draft = tiny_model("llama", seed=0), tiny_model("llama", seed=0)
    folder = write_prompts(tmp_path, draft, 3)
    drafter = Checked(ModelConfig(depth=8, beams=2, max_nodes=64, prompt_tokens=folder), draft)
    drafter._levels = lambda batch: ModelDrafter._levels(drafter, batch)  # type: ignore[method-assign]
    decoder = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False)
    decoder.generate([5] * (LONGEST_CHAIN + 3), max_new_tokens=12, ignore_eos=True)
    assert drafter.passes <= 2 * decoder.stats.passes
    assert decoder.stats.drafted > 0


def test_policies_that_want_drawn_children_do_without(tmp_path: Path) -> None:
    target, draft = tiny_model("llama", seed=0), tiny_model("llama", seed=0)
    drafter = ModelDrafter(ModelConfig(prompt_tokens=write_prompts(tmp_path, draft)), draft)
    decoder = SpecDecoder(target, drafter, verifier="rejection", on_drafter_error="raise", adaptive=False)
    decoder.generate(PROMPTS, max_new_tokens=12, temperature=1.0, seed=0)
    assert decoder.stats.accepted > 0


def test_prompt_tokens_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = write_prompts(tmp_path, tiny_model("llama", num_hidden_layers=3))
    with pytest.raises(ValueError, match="for another target: num_layers 3, not 2"):
        ModelDrafter(ModelConfig(prompt_tokens=folder), tiny_model("llama"))
    with pytest.raises(ValueError, match="cannot be read"):
        ModelDrafter(ModelConfig(prompt_tokens=str(tmp_path / "nowhere")), tiny_model("llama"))


def test_a_level_between_passes_reads_the_ancestors_prompt_tokens() -> None:
    """Logits are told apart by construction: node n, distance j gives 10 n + j."""

    class NoModel:
        """Must not be run."""

    prompts = object.__new__(DraftPrompts)
    prompts.num_tokens = 2
    known = torch.tensor([[[[0.0], [1.0], [2.0]]]])  # [1, 1, 3, 1]
    ahead = Lookahead(prompts, NoModel(), NoModel(), known)  # type: ignore[arg-type]
    tree = TokenTree(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[-1, 0, 0, 1]]))
    assert ahead.logits(tree.select(torch.tensor([[0]]), torch.tensor([[True]])), 0, 1).tolist() == [[[0.0]]]
    assert ahead.logits(tree, 3, 3).tolist() == [[[2.0]]]
    ahead._known = torch.tensor([[[[10.0], [11.0]], [[20.0], [21.0]]]])
    ahead._level, ahead._column = 2, 1
    deeper = TokenTree(torch.zeros(1, 5, dtype=torch.int64), torch.tensor([[-1, 0, 0, 2, 1]]))
    assert ahead.logits(deeper, 3, 3).tolist() == [[[21.0], [11.0]]]

"""EAGLE: drafting a tree, step after step, is running its module over the whole text, and text is unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from integration.architectures import VOCAB, tiny_model
from torch import Tensor, nn
from training.eagle_reference import check_levels, from_scratch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from unit_heads import WIDTH
from unit_rows import make_batch

from specdec import SpecDecoder
from specdec.batch import Batch
from specdec.drafters import heads
from specdec.drafters.eagle import EagleConfig, EagleDrafter, make_eagle, make_first_eagle
from specdec.drafters.layer import LayerShape, causal_attention
from specdec.drafters.weights import DrafterWeights, TargetFacts
from specdec.sampling import SamplingParams
from specdec.target import Feature, HFTarget
from specdec.tree import TokenTree

PROMPTS = [[5, 6, 7, 8, 5, 6, 7, 8, 5], [9], [40, 41, 42, 40, 41] * 3]
WIDE = EagleConfig(depth=4, width=8, branching=12, max_nodes=60)
TEXTS = [[*range(3, 20)], [50, 40, 30, 20, 10]]
PUBLISHED = {"scaled": False, "mixed": False, "own_output": True, "fc_bias": True, "norm_before_residual": True}
FORMS: dict[str, dict[str, Any]] = {
    "ours": {"states": [2, 1, "pre_norm"], "vocab_size": 60},
    "ours, whole vocabulary": {"states": [0, 1, 2]},
    "EAGLE-3": {"states": [1, 1, 2], "vocab_size": 60, **PUBLISHED},
    "first": {"fc_bias": True},
}


@pytest.fixture(scope="module")
def exact() -> HFTarget:
    """In float64, so that another order of sums is all that may differ."""
    return HFTarget(tiny_model(initializer_range=0.15).double())


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny_model(initializer_range=0.15))


def random_weights(target: HFTarget, form: str) -> DrafterWeights:
    """Weights without training, none of them zero."""
    torch.manual_seed(1)
    shape = {"layer": asdict(LayerShape.of(target)), **FORMS[form]}
    module: Any = make_eagle(shape) if "states" in shape else make_first_eagle(shape)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    if module.vocabulary is not None:
        module.vocabulary.copy_(torch.randperm(VOCAB)[:60].sort().values)
    return DrafterWeights("eagle", TargetFacts.of(target), shape, module.state_dict())


def bound(target: HFTarget, form: str) -> EagleDrafter:
    drafter = EagleDrafter(WIDE, random_weights(target, form))
    drafter.bind(target, None)
    return drafter


@torch.no_grad()
def absorb_pieces(
    drafter: EagleDrafter, target: HFTarget, rows: Sequence[Sequence[int]], pieces: Sequence[Sequence[int]]
) -> None:
    """Feed texts, all but their last tokens, some of each row at a time; ``pieces`` are counts per row."""
    cache = target.new_cache(len(rows), 64)
    features = target.extend([row[:-1] for row in rows], cache, drafter.features).features
    done = [0] * len(rows)
    for counts in pieces:
        width = max(counts)
        tokens = torch.full((len(rows), width), 3)
        part: dict[Feature, Tensor] = {k: v.new_full((len(rows), width, WIDTH), 7.0) for k, v in features.items()}
        for index, (row, start, count) in enumerate(zip(rows, done, counts, strict=True)):
            tokens[index, :count] = torch.tensor(row[start + 1 : start + 1 + count])
            for name, values in features.items():
                part[name][index, :count] = values[index, start : start + count]
        drafter.absorb(part, tokens, counts)
        done = [start + count for start, count in zip(done, counts, strict=True)]
    assert done == [len(row) - 1 for row in rows]


@pytest.mark.parametrize("chunk", [512, 4])
@pytest.mark.parametrize("form", FORMS)
def test_a_tree_is_drafted_as_token_by_token(
    exact: HFTarget, monkeypatch: pytest.MonkeyPatch, form: str, chunk: int
) -> None:
    monkeypatch.setattr("specdec.drafters.eagle.PREFILL_CHUNK", chunk)
    drafter = bound(exact, form)
    drafter.begin(2)
    absorb_pieces(drafter, exact, TEXTS, [(11, 0), (0, 3), (3, 0), (2, 1)])
    check_levels(drafter, exact, TEXTS)
    check_levels(drafter, exact, TEXTS)  # drafting left nothing behind

    drafter.keep_rows(torch.tensor([1]))
    check_levels(drafter, exact, TEXTS[1:], [1])


@pytest.mark.parametrize("form", ["ours", "first"])
def test_rows_of_a_batch_are_drafted_for_alone(exact: HFTarget, form: str) -> None:
    for index, text in enumerate(TEXTS):
        drafter = bound(exact, form)
        drafter.begin(1)
        absorb_pieces(drafter, exact, [text], [(len(text) - 1,)])
        check_levels(drafter, exact, [text], [index])


def test_the_cache_grows_with_the_text(exact: HFTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.drafters.eagle.PREFILL_CHUNK", 3)
    drafter = bound(exact, "ours")
    drafter.begin(1)
    text = [index % 60 for index in range(40)]
    absorb_pieces(drafter, exact, [text], [(1,)] * 39)
    check_levels(drafter, exact, [text], [0])


class CheckedEagle(EagleDrafter):
    """Compares the state every draft starts from with one computed from scratch."""

    target: HFTarget
    checked: int

    def propose(self, batch: Batch) -> TokenTree:
        for index, row in enumerate(batch.rows):
            if len(row.tokens) > 1:
                got = self.logits(TokenTree.from_pending(batch.pending), 0, 1)[index, 0]
                expected = from_scratch(self, self.target, row.tokens, ())
                torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
                self.checked += 1
        return super().propose(batch)


@pytest.mark.parametrize("form", ["ours, whole vocabulary", "first"])
def test_it_keeps_up_with_accepted_paths_and_ending_rows(exact: HFTarget, form: str) -> None:
    """Hot coupled text is mostly noise, which the drafter knows: long paths are accepted."""
    drafter = CheckedEagle(WIDE, random_weights(exact, form))
    drafter.target, drafter.checked = exact, 0
    decoder = SpecDecoder(exact, drafter, on_drafter_error="raise", adaptive=False)
    lengths = set()
    for seed in (3, 5):
        results = decoder.generate(PROMPTS, max_new_tokens=40, temperature=8.0, seed=seed)
        assert decoder.stats.accepted > 25
        lengths |= {len(result.token_ids) for result in results}

    assert drafter.checked > 20
    assert len(lengths) > 2  # rows ended at different times


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 2.0, "repetition_penalty": 1.3},
    ],
    ids=["greedy", "coupled", "coupled and penalised"],
)
def test_text_is_that_of_plain_decoding(target: HFTarget, form: str, fields: dict[str, Any]) -> None:
    fields = {"max_new_tokens": 14, "seed": 7, **fields}
    expected = [r.token_ids for r in SpecDecoder(target, "none").generate(PROMPTS, **fields)]
    decoder = SpecDecoder(
        target, EagleDrafter(WIDE, random_weights(target, form)), on_drafter_error="raise", adaptive=False
    )
    for _ in range(2):
        assert [r.token_ids for r in decoder.generate(PROMPTS, **fields)] == expected
    assert decoder.stats.drafted > 0
    assert [decoder.generate(prompt, **fields).token_ids for prompt in PROMPTS] == expected


def test_prompts_of_one_token_have_no_state_to_draft_from(target: HFTarget) -> None:
    drafter = bound(target, "ours")
    drafter.start(make_batch([[4], [9]], VOCAB, SamplingParams()), None)
    drafter.propose(make_batch([[4], [9]], VOCAB, SamplingParams())).validate(VOCAB)
    drafter.stop()


@torch.no_grad()
@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=["plain", "linear", "llama3"],
)  # fmt: skip
def test_the_first_form_is_a_layer_of_llama_without_its_first_norm(scaling: dict[str, Any] | None) -> None:
    """As speculators builds it, from transformers' own layer; biases and scaled angles with it."""
    rope = {"rope_theta": 500.0, "rope_type": "default", **(scaling or {})}
    config = tiny_model(attention_bias=True, rope_parameters=rope).config
    torch.manual_seed(2)
    theirs: Any = LlamaDecoderLayer(config, 0)
    theirs.input_layernorm = nn.Identity()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.2)
    theirs.self_attn.o_proj.bias.zero_()
    shape = LayerShape(WIDTH, 4, 2, 16, 96, 500.0, config.rms_norm_eps, True, scaling)
    module = make_first_eagle({"layer": asdict(shape)})
    names = {name.split(".", 1)[1] if "." in name else name: value for name, value in theirs.named_parameters()}
    names |= {"post_attention_layernorm.weight": theirs.post_attention_layernorm.weight}
    module.layer.load_state_dict({name: names[name] for name in module.layer.state_dict()})

    hidden, embedded = torch.randn(2, 1, 40, WIDTH)
    positions = torch.arange(40).unsqueeze(0)
    mixed = module.fc(torch.cat([embedded, hidden], dim=-1))
    mask = torch.full((40, 40), -torch.inf).triu(1).expand(1, 1, -1, -1)
    angles = LlamaRotaryEmbedding(config)(mixed, positions)
    expected = theirs(mixed, attention_mask=mask, position_ids=positions, position_embeddings=angles)
    got = module.read(module(module.fuse({"last": hidden}), embedded, positions, causal_attention))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_drafting_in_bfloat16_is_as_exact_as_the_plain_layers_are(form: str) -> None:
    """Layers are packed where the CPU has kernels for it: twice the error of plain ones at most, against float32."""
    rounded = HFTarget(tiny_model().bfloat16())
    wide = HFTarget(tiny_model().bfloat16().float())
    weights = random_weights(rounded, form)
    weights.tensors.update({k: v.bfloat16() for k, v in weights.tensors.items() if v.is_floating_point()})
    states: tuple[Feature, ...] = tuple(FORMS[form].get("states", ("last",)))
    features = {key: torch.randn(1, 5, WIDTH).bfloat16() for key in states}
    tokens, tree = torch.randint(VOCAB, (1, 5)), TokenTree(torch.tensor([[5, 6, 7]]), torch.tensor([[-1, 0, 0]]))

    @torch.no_grad()
    def drafted(target: HFTarget, plain: bool = False) -> Tensor:
        drafter = EagleDrafter(WIDE, weights)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heads, "panels_run", lambda: False)  # 8 bits are not meant to be exact
            if plain:
                patch.setattr(heads, "can_pack", lambda _: False)
            drafter.bind(target, None)
        drafter.begin(1)
        drafter.absorb({key: value.to(target.dtype) for key, value in features.items()}, tokens, [5])
        first = drafter.logits(TokenTree.from_pending(tree.tokens[:, 0]), 0, 1)
        return torch.cat([first, drafter.logits(tree, 1, 2)], dim=1).float()

    exact, plain, packed = drafted(wide), drafted(rounded, plain=True), drafted(rounded)
    assert float((packed - exact).norm()) <= 2 * float((plain - exact).norm())
    assert float((packed - exact).norm()) < 0.1 * float(exact.norm())

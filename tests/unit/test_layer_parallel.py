"""Layer-parallel drafting: exact where it must be, the same in every form, and never part of the text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from integration import torchrun_ranks
from integration.architectures import VOCAB, describe_difference, generate_alone, tiny_model
from unit_rows import make_batch

from specdec import SpecDecoder
from specdec.drafters.hybrid import HybridConfig, HybridDrafter
from specdec.drafters.layer_groups import (
    GroupedKVCache,
    LayerGroup,
    LayerParallelModel,
    group_layers,
)
from specdec.drafters.layer_parallel import LayerParallelConfig, LayerParallelDrafter
from specdec.drafters.model import ModelConfig, ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.memory_plan import drafter_weights
from specdec.target import HFTarget
from specdec.tree import TokenTree

PROGRAMS = Path(__file__).parents[1] / "integration"
LAYERS = 7
PROMPTS = [[5, 6, 7, 8, 9] * 3, [30, 31], [9, 10, 11, 9, 10, 11, 9]]
CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True},
    "mistral": {},
    "qwen2": {"use_sliding_window": False, "layer_types": None},
    "qwen3": {},
}
TOLERANCE = 1e-4  # logits of order 10 in float32, summed in another order


def draft_model(architecture: str = "llama", **changes: Any) -> Any:
    """A model of seven layers: one first, five in the middle, one last."""
    return tiny_model(architecture, seed=1, num_hidden_layers=LAYERS, **CHANGES[architecture], **changes)


def drafts(model: HFTarget) -> torch.Tensor:
    """``[B, n, V]`` logits of nodes drafted below roots: behind committed tokens of two lengths, in two passes."""
    rows = [[5, 6, 7, 8], [9, 10]]
    cache = model.new_cache(2, 16)
    model.extend(rows, cache)
    tokens = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 24, 25]])
    parents = torch.tensor([[-1, 0, 0, 1, 3], [-1, 0, 1, 2, 2]])
    model.forward(TokenTree(tokens[:, :1], parents[:, :1]), cache)
    first = model.forward(TokenTree(tokens[:, :3], parents[:, :3]), cache, first_node=1).logits
    return torch.cat([first, model.forward(TokenTree(tokens, parents), cache, first_node=3).logits], dim=1)


@pytest.mark.parametrize(
    ("windows", "size", "expected"),
    [
        ([None] * 6, 4, [range(1, 5)]),
        ([None] * 7, 4, [range(1, 5)]),  # a layer left over is no group
        ([None] * 8, 3, [range(1, 4), range(4, 7)]),
        ([None] * 6, 1, []),
        ([None] * 2, 4, []),
        ([None], 4, []),
        ([None, None, None, 8, 8, 8, None], 4, [range(1, 3), range(3, 6)]),
    ],
)
def test_groups_lie_between_the_ends_and_do_not_mix_windows(
    windows: list[int | None], size: int, expected: list[range]
) -> None:
    assert group_layers(windows, size) == expected


@pytest.mark.parametrize("architecture", CHANGES)
def test_a_group_of_one_layer_is_the_layer_to_the_bit(architecture: str) -> None:
    model = draft_model(architecture)
    hidden = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(5).expand(2, -1)
    named = {
        "position_embeddings": model.model.rotary_emb(hidden, positions),
        "position_ids": positions,
        "attention_mask": None,
    }
    with torch.inference_mode():
        expected = model.model.layers[3](hidden, **named)
        assert torch.equal(LayerGroup([model.model.layers[3]])(hidden, **named), expected)


def test_groups_of_one_draft_what_the_model_drafts_to_the_bit() -> None:
    model = draft_model()
    with torch.inference_mode():
        exact = drafts(HFTarget(model))
        for how in ("fused", "separate"):
            assert torch.equal(drafts(LayerParallelModel(model, 1, how)), exact)
        assert not torch.equal(drafts(LayerParallelModel(model, 4, "separate")), exact)


@torch.inference_mode()
def test_a_group_is_what_the_paper_says() -> None:
    """One draft pass by the definition, from the state that enters the group and the exact keys and values."""
    model = draft_model()
    tokens, position = torch.tensor([[5, 6, 7, 8]]), 3
    grouped = LayerParallelModel(model, 3, "separate")  # layers 0 | 1 2 3 | 4 5 | 6
    cache = grouped.new_cache(1, 8)
    grouped.extend([[5, 6, 7]], cache)
    cache.truncate([2])  # 7 is the root, its keys and values are there
    tree = TokenTree(torch.tensor([[7, 8]]), torch.tensor([[-1, 0]]))
    got = grouped.forward(tree, cache, first_node=1).logits[0, 0]

    base, states = model.model, model(tokens, output_hidden_states=True, use_cache=False).hidden_states
    rotary = base.rotary_emb(states[0], torch.arange(4).unsqueeze(0))

    def attention(layer: int, newest: torch.Tensor) -> torch.Tensor:
        """Of the last token, whose state is ``newest``, over exact states of those before."""
        entering = torch.cat([states[layer][:, :position], newest], dim=1)
        block = base.layers[layer]
        mask = torch.ones(4, 4).tril().log()[None, None]
        out = block.self_attn(block.input_layernorm(entering), position_embeddings=rotary, attention_mask=mask)[0]
        return torch.as_tensor(out[:, position:])

    def mlp(layer: int, state: torch.Tensor) -> torch.Tensor:
        block = base.layers[layer]
        return torch.as_tensor(state + block.mlp(block.post_attention_layernorm(state)))

    state = model.get_input_embeddings()(tokens[:, position:])
    for group in ([0], [1, 2, 3], [4, 5], [6]):
        attended = [attention(layer, state) for layer in group]
        for layer, out in zip(group, attended, strict=True):
            state = mlp(layer, state + out)
    torch.testing.assert_close(got, model.lm_head(base.norm(state))[0, 0], atol=TOLERANCE, rtol=TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("size", [2, 4, 5])
@pytest.mark.parametrize("architecture", CHANGES)
def test_batched_products_compute_what_separate_attentions_do(architecture: str, size: int) -> None:
    model = draft_model(architecture)
    fused, separate = (drafts(LayerParallelModel(model, size, how)) for how in ("fused", "separate"))
    torch.testing.assert_close(fused, separate, atol=TOLERANCE, rtol=TOLERANCE)


@torch.inference_mode()
def test_packed_layers_draft_alike() -> None:
    from specdec.packing import can_pack, pack_linears

    model = draft_model().to(torch.bfloat16)
    if not can_pack(model):
        pytest.skip("this CPU does not compute in bfloat16")
    separate = drafts(LayerParallelModel(model, 4, "separate"))
    pack_linears(model)
    packed = drafts(LayerParallelModel(model, 4, "fused"))
    # bfloat16 keeps 8 bits, and errors of seven layers add up as in a random walk
    assert float((packed - separate).float().norm() / separate.float().norm()) < 7**0.5 * 2**-7


@torch.inference_mode()
def test_what_is_kept_is_exact_however_it_was_drafted() -> None:
    """Bonus calibration: keys and values behind the accepted tokens are those of an exact pass."""
    drafter = LayerParallelDrafter(model=draft_model())
    drafter.bind(HFTarget(tiny_model()), None)
    batch = make_batch([[5, 6, 7, 8], [9, 10]], VOCAB)
    rows = batch.rows
    drafter.start(batch, None)
    for more in ([11, 12, 13], [14]):
        drafter.propose(batch)
        for row in rows:
            row.tokens.extend(more)
    drafter.propose(batch)
    cache = drafter._cache
    assert isinstance(cache, GroupedKVCache)
    cache.check_integrity()
    fresh = drafter.draft_model.new_cache(2, 64)
    drafter.draft_model.extend([row.tokens for row in rows], fresh)
    assert sorted(fresh.layers) == [0, 1, 5, 6]  # 1 holds layers 1 to 4
    for layer, buffers in fresh.layers.items():
        for row, length in enumerate(cache.row_lengths):
            assert length == len(rows[row].tokens) - 1
            kept = cache.layers[layer]
            for mine, exact in ((kept.keys, buffers.keys), (kept.values, buffers.values)):
                torch.testing.assert_close(mine[row, :, :length], exact[row, :, :length], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", CHANGES)
@pytest.mark.parametrize("options", [{"group": 2}, {"group": 4}, {"group": 4, "attention": "separate"}])
def test_text_is_the_models_own_whatever_the_grouping(architecture: str, options: dict[str, Any]) -> None:
    target = tiny_model(architecture, **CHANGES[architecture])
    decoder = SpecDecoder(
        target,
        LayerParallelDrafter(LayerParallelConfig(**options), draft_model(architecture)),
        adaptive=False,
        on_drafter_error="raise",
    )
    results = decoder.generate(PROMPTS, max_new_tokens=20, ignore_eos=True)
    for prompt, result in zip(PROMPTS, results, strict=True):
        expected = generate_alone(target, prompt, 20, eos_token_id=None)
        assert result.token_ids == expected, describe_difference(target, prompt, expected, result.token_ids)


@pytest.mark.parametrize("verifier", ["coupled", "rejection"])
def test_sampling_goes_with_it(verifier: str) -> None:
    target = tiny_model()
    decoder = SpecDecoder(
        target,
        LayerParallelDrafter(model=draft_model()),
        verifier=verifier,
        adaptive=False,
        on_drafter_error="raise",
    )
    result = decoder.generate(PROMPTS[0], max_new_tokens=20, temperature=1.0, seed=3, ignore_eos=True)
    assert decoder.stats.drafted > 0
    if verifier == "coupled":
        plain = SpecDecoder(target, "none").generate(
            PROMPTS[0], max_new_tokens=20, temperature=1.0, seed=3, ignore_eos=True
        )
        assert result.token_ids == plain.token_ids


def test_a_model_drafting_for_itself_is_accepted_less_with_groups_but_not_without() -> None:
    model = draft_model()
    tau = {}
    for size in (1, 4):
        config = LayerParallelConfig(group=size, beams=1, max_nodes=6)
        decoder = SpecDecoder(model, LayerParallelDrafter(config, model), adaptive=False, on_drafter_error="raise")
        decoder.generate(PROMPTS[0], max_new_tokens=24, ignore_eos=True)
        tau[size] = decoder.stats.tau
    assert tau[1] == 6.0
    assert tau[4] < 6.0


def test_batched_weights_count_as_memory() -> None:
    model = draft_model()
    alone = ModelDrafter(ModelConfig(), model)
    grouped = LayerParallelDrafter(LayerParallelConfig(group=4), model)
    per_layer = 4 * (64 * 128 + 128 + 64 * 64 + 64)  # bytes of a layer's four projections, biases too
    target = HFTarget(draft_model())
    assert drafter_weights(grouped, target) - drafter_weights(alone, target) == 4 * per_layer
    assert drafter_weights(grouped, HFTarget(model)) == 4 * per_layer  # a model that drafts for itself is there once


def test_other_layers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Gemma2ForCausalLM cannot draft layer-parallel.*Gemma2DecoderLayer"):
        LayerParallelDrafter(model=tiny_model("gemma2"))
    with pytest.raises(ValueError, match="needs the processes of torchrun"):
        LayerParallelDrafter(LayerParallelConfig(attention="ranks"), draft_model())


def run_program(arguments: list[str], timeout: int) -> str:
    """What a program of the tests prints, in processes of one thread each."""
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([*map(str, (tests, tests / "unit", tests.parent)), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_processes_that_share_the_attentions_draft_the_same_to_the_bit() -> None:
    """Two and four gloo ranks against one process, in float32."""
    assert run_program([str(PROGRAMS / "layer_ranks.py")], 120).split() == ["2", "4"]


def test_torchrun_starts_the_processes_and_their_text_is_that_of_one(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run_program([*launch, str(PROGRAMS / "torchrun_ranks.py"), str(tmp_path)], 120)
    alone = torchrun_ranks.decode("separate")
    assert all(drafted > 0 for drafted, _ in alone["accepted"])
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == alone, rank


def test_clocks_that_may_disagree_are_refused_before_anybody_waits() -> None:
    drafter = LayerParallelDrafter(model=draft_model())
    drafter.in_step = True
    with pytest.raises(ValueError, match=r"'layer_parallel' shares its work .* pass adaptive=False \(--fixed-trees\)"):
        SpecDecoder(tiny_model(), drafter)
    SpecDecoder(tiny_model(), drafter, adaptive=False)
    hybrid = HybridDrafter([SuffixDrafter(), drafter])
    with pytest.raises(ValueError, match="pass adaptive=False"):
        SpecDecoder(tiny_model(), hybrid)
    with pytest.raises(ValueError, match=r"have 'suffix\+layer_parallel' ask all parts in every pass"):
        SpecDecoder(tiny_model(), hybrid, adaptive=False)
    always = HybridDrafter([SuffixDrafter(), drafter], HybridConfig(ask="always"))
    SpecDecoder(tiny_model(), always, adaptive=False)

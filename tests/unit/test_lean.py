"""Short decoder layers: transformers' numbers but for rounding, and in bfloat16 the same text whatever is drafted."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specdec import SpecDecoder, attention, lean
from specdec.drafters.model import ModelDrafter
from specdec.group_panels import GroupW8A8PanelWeight, W4A8PanelWeight
from specdec.kernels.w4a16 import from_dense
from specdec.lean import LeanLayer, can_be_lean, is_whole
from specdec.lean_stack import KNOWN_STACKS, LeanStack, is_stack_and_head, make_lean, will_compile
from specdec.packing import FusedPart, PackedLinear, can_pack, pack_linears
from specdec.panels import PanelWeight, W8A8PanelWeight, panels_run
from specdec.stored_weights import run_int4
from specdec.target import HFTarget
from specdec.tree import PADDING, TokenTree

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
MODELS: dict[str, tuple[type, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama with biases": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=9, max_window_layers=1)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=11)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"} | {
        "num_attention_heads": 2, "num_key_value_heads": 1, "use_sliding_window": True, "sliding_window": 9,
        "max_window_layers": 1,
    })),
}  # fmt: skip


def make(name: str) -> Any:
    """A random model in bfloat16."""
    kind, config = MODELS[name]
    torch.manual_seed(0)
    model = kind(copy.deepcopy(config)).to(torch.bfloat16).eval().requires_grad_(False)
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.normal_()
    for name, weight in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weight.uniform_(0.5, 1.5)
    if not can_pack(model):
        pytest.skip("this CPU does not compute in bfloat16")
    return model


def short(model: Any) -> Any:
    pack_linears(model)
    assert make_lean(model) == model.config.num_hidden_layers
    return model


NARROW = LlamaConfig(**{**SIZES, "head_dim": 24})
GELU = LlamaConfig(**SIZES, hidden_act="gelu")


@pytest.mark.skipif(not panels_run(), reason="no C compiler: nothing is compiled")
@pytest.mark.parametrize("config", [*(config for _, config in MODELS.values()), NARROW, GELU, Gemma2Config(**SIZES)])
def test_what_will_compile_is_known_from_the_configuration(config: Any) -> None:
    model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config)).to(torch.bfloat16).eval().requires_grad_(False)
    pack_linears(model)
    make_lean(model)
    assert will_compile(type(model).__name__, config) == HFTarget(model).takes_uneven


@pytest.fixture(params=list(MODELS))
def pair(request: pytest.FixtureRequest) -> tuple[HFTarget, HFTarget]:
    """A model as it is, and with short layers."""
    return HFTarget(make(request.param)), HFTarget(short(make(request.param)))


def run(target: HFTarget, nodes: int, features: bool = False) -> Tensor:
    """Logits of a tree of two branches after a prompt of 70 tokens."""
    torch.manual_seed(1)
    prompt = torch.randint(0, 97, (2, 70)).tolist()
    tokens = torch.randint(0, 97, (2, nodes))
    parents = torch.arange(-2, nodes - 2).clamp(min=0).expand(2, -1).clone()
    parents[:, 0] = -1
    cache = target.new_cache(2, 100 + nodes)
    with torch.inference_mode():
        target.extend([prompt[0], prompt[1][:31]], cache)
        out = target.forward(TokenTree(tokens, parents), cache, (1, "pre_norm", "last") if features else ())
    return torch.cat([*out.features.values()], dim=-1) if features else out.logits


@pytest.mark.parametrize("compiled", ["whole", "in parts", "not"])
@pytest.mark.parametrize("nodes", [1, 13, 70])
def test_logits_are_those_of_the_own_layers(
    pair: tuple[HFTarget, HFTarget], nodes: int, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, mine = pair
    for layer in mine.model.model.layers if compiled != "whole" else ():
        monkeypatch.setattr(layer.forward, "arguments", None)
        if compiled == "not":
            monkeypatch.setattr(layer.forward, "_kernels", None)
    # Beside the same weights in float32, short layers are off by no more than transformers' own, give or take what a
    # mean over a few hundred roundings varies by. An attention that saw one token too many would be off much further.
    exact = HFTarget(copy.deepcopy(plain.model).float())
    for features in (False, True):
        expected, theirs, got = (run(target, nodes, features).double() for target in (exact, plain, mine))
        assert (got - expected).abs().max() <= 2 * (theirs - expected).abs().max()
        assert (got - expected).abs().mean() <= 1.3 * (theirs - expected).abs().mean()


def test_the_models_own_generate_is_untouched(pair: tuple[HFTarget, HFTarget]) -> None:
    plain, mine = pair
    packed = copy.deepcopy(plain.model)
    pack_linears(packed)
    ids = torch.arange(20).unsqueeze(0)
    wanted = packed.generate(ids, max_new_tokens=12, do_sample=False)
    run(mine, 5)
    assert torch.equal(mine.model.generate(ids, max_new_tokens=12, do_sample=False), wanted)


@pytest.mark.parametrize(
    ("drafter", "temperature"),
    [("ngram", 0.0), ("suffix", 0.9), ("recycling", 0.0), ("lookahead", 0.0), ("skip", 0.0), ("model", 0.0)],
)
def test_bfloat16_texts_do_not_depend_on_drafts(
    pair: tuple[HFTarget, HFTarget], drafter: str, temperature: float
) -> None:
    if lean.find_kernels() is None:
        pytest.skip("no C compiler")
    target = pair[1]
    prompts = [list(range(40)), [5, 6, 7, 5, 6, 7, 5, 6], [90] * 75, [3]]
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": temperature, "seed": 3, "ignore_eos": True}
    expected = [result.token_ids for result in SpecDecoder(target, "none").generate(prompts, **options)]
    drafting = ModelDrafter(model=make("llama")) if drafter == "model" else drafter
    decoder = SpecDecoder(target, drafting, adaptive=False, on_drafter_error="raise")
    for _ in range(2):
        found = decoder.generate(prompts, **options)
        assert [result.token_ids for result in found] == expected
    if drafter == "suffix":  # which knows the texts by now
        assert sum(result.stats.accepted for result in found) > 45


def test_texts_in_a_batch_are_those_of_one_alone_for_prompts_of_a_pass(pair: tuple[HFTarget, HFTarget]) -> None:
    if lean.find_kernels() is None:
        pytest.skip("no C compiler")
    decoder = SpecDecoder(pair[1], "suffix", adaptive=False)
    prompts = [list(range(30)), [5, 6, 7, 5, 6, 7, 5, 6], [90] * 55, [3]]
    together = decoder.generate(prompts, max_new_tokens=30, ignore_eos=True)
    for prompt, result in zip(prompts, together, strict=True):
        assert decoder.generate(prompt, max_new_tokens=30, ignore_eos=True).token_ids == result.token_ids


@pytest.mark.parametrize("heard", [False, True])
def test_rows_of_different_sizes_take_only_their_own_nodes(
    pair: tuple[HFTarget, HFTarget], heard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What pads the smaller trees is not computed, and what is computed is the same to the bit."""
    target = pair[1]
    widths: list[int] = []
    monkeypatch.setattr(attention, "unfilled", lambda like, shape: like.new_full(shape, torch.nan))
    layers = target.model.model.layers
    if heard:
        layers[1].register_forward_hook(lambda _module, _args, out: widths.append(out[..., 0].numel()))
    torch.manual_seed(2)
    sizes, width = (3, 9, 1, 6), 9
    tokens = torch.randint(0, 97, (4, width))
    parents = torch.tensor([[-1, *(int(torch.randint(0, i, ())) for i in range(1, width))] for _ in sizes])
    padding = torch.arange(width) >= torch.tensor(sizes).unsqueeze(1)
    tree = TokenTree(tokens, parents.masked_fill(padding, PADDING))
    prompts = [torch.randint(0, 97, (length,)).tolist() for length in (5, 40, 64, 33)]
    found = []
    with torch.inference_mode():
        for padded in (True, False):
            cache = target.new_cache(4, 100)
            target.extend(prompts, cache)
            if padded:
                out = target.run(tree.tokens, None, cache, tree.depth, tree.ancestors, (1, "pre_norm", "last"))
            else:
                out = target.forward(tree, cache, (1, "pre_norm", "last"))
            cache.commit(torch.tensor([[0, 1], [0, 1], [0, 0], [0, 1]]), [2, 2, 1, 2])
            after = target.forward(TokenTree.from_pending(tokens[:, 0]), cache).logits
            found.append([*(part[tree.valid] for part in (out.logits, *out.features.values())), after])
    for expected, got in zip(*found, strict=True):
        assert torch.equal(got, expected)
    if heard and isinstance(target.model.model.forward, LeanStack):
        assert widths[-2] == sum(sizes), "the pass before the last one"


def test_layers_that_are_not_known_or_not_packed_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    assert make_lean(model) == 0
    torch.manual_seed(0)
    other = Gemma2ForCausalLM(Gemma2Config(**SIZES)).to(torch.bfloat16).eval().requires_grad_(False)
    pack_linears(other)
    assert make_lean(other) == 0
    pack_linears(model)
    assert can_be_lean(model.model.layers[0])
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    assert not can_be_lean(model.model.layers[0])
    assert make_lean(model) == 2
    assert isinstance(model.model.layers[1].forward, LeanLayer)
    assert make_lean(model) == 2  # asked again, it stays as it is
    assert not isinstance(model.model.layers[1].forward._own, LeanLayer)


def test_layers_that_are_listened_to_compute_the_same(pair: tuple[HFTarget, HFTarget]) -> None:
    """In one call or layer by layer: the same bits, and listeners hear each layer's output."""
    target = pair[1]
    together = run(target, 13)
    heard: list[Tensor] = []
    layers = target.model.model.layers
    handles = [layer.register_forward_hook(lambda _module, _args, out: heard.append(out)) for layer in layers]
    apart = run(target, 13)
    for handle in handles:
        handle.remove()
    assert torch.equal(together, apart)
    assert len(heard) == 2 * len(handles), "the prompt's pass and the tree's"
    assert torch.equal(heard[-1], run(target, 13, features=True)[..., 64:128])


def test_angles_are_looked_up_as_the_model_computes_them(pair: tuple[HFTarget, HFTarget]) -> None:
    stack = pair[1].model.model.forward
    assert isinstance(stack, LeanStack) == (type(pair[1].model.model).__name__ in KNOWN_STACKS)
    if not isinstance(stack, LeanStack):
        return
    states = torch.zeros(2, 5, 64, dtype=torch.bfloat16)
    for last in (200, 3000, 7):
        positions = torch.tensor([[0, 1, 2, last - 1, last], [5, 4, 3, 2, 1]])
        expected = stack._stack.rotary_emb(states, position_ids=positions)
        for got, wanted in zip(stack._rotary(states, positions, last + 1), expected, strict=True):
            assert torch.equal(got, wanted)


def test_a_target_says_whether_its_rows_depend_on_each_other() -> None:
    model = make("llama")
    assert not HFTarget(model).invariant
    with pytest.raises(ValueError, match=r"rounding of LlamaForCausalLM in torch\.bfloat16 on cpu depends"):
        SpecDecoder(model, "none", invariant=True)
    short(model)
    if not model.model.layers[0].forward.compiled:
        pytest.skip("no C compiler")
    assert HFTarget(model).invariant
    assert SpecDecoder(model, "ngram", invariant=True).target.invariant
    assert not HFTarget(Gemma2ForCausalLM(Gemma2Config(**SIZES, layer_types=None)).eval()).invariant


@pytest.mark.parametrize("nodes", [1, 13, 70])
@pytest.mark.parametrize("zero_points", [True, False])
def test_layers_of_codes_in_groups_give_what_their_dense_weights_give(zero_points: bool, nodes: int) -> None:
    """To the bit, all layers in one call: what a GGUF file's blocks rest on."""
    model = make("llama")
    if not panels_run():
        pytest.skip("our own kernels do not run here")
    pack_linears(model, lambda weight, bias: run_int4(from_dense(weight, 32, zero_points), bias, weight.dtype))
    dense = make("llama")
    theirs = dict(dense.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | FusedPart):
            packed = module.packed if isinstance(module, PackedLinear) else module.product.packed
            assert isinstance(packed, PanelWeight)
            theirs[name].weight.copy_(module.weight)
    make_lean(model)
    assert all(is_whole(layer) for layer in model.model.layers)
    assert torch.equal(run(HFTarget(model), nodes), run(HFTarget(short(dense)), nodes))


def laid_out(kind: str, weight: Tensor, bias: Tensor | None) -> PanelWeight:
    if kind == "w8a8":
        return W8A8PanelWeight(weight, bias)
    if kind == "w4a8":
        return W4A8PanelWeight(from_dense(weight, 32, zero_points=False), bias)
    groups = weight.float().unflatten(1, (-1, 32))
    scales = (groups.abs().amax(-1) / 127).half()
    codes = (groups / scales.unsqueeze(-1).float()).round().clamp(-127, 127)
    return GroupW8A8PanelWeight(codes.to(torch.int8).flatten(1), scales, bias)


@pytest.mark.parametrize("kind", ["bfloat16", "w8a8", "w4a8", "groups of 8 bits"])
def test_logits_of_many_rows_of_different_sizes_are_written_where_they_belong(kind: str) -> None:
    """More nodes than are multiplied at a time, and a vocabulary that ends within a panel."""
    if not panels_run():
        pytest.skip("our own kernels do not run here")
    model = make("llama")
    pack_linears(model, *([] if kind == "bfloat16" else [functools.partial(laid_out, kind)]))
    make_lean(model)
    target = HFTarget(model)
    assert target.takes_uneven
    sizes = [1 + (7 * row) % 12 for row in range(60)]
    assert sum(sizes) > 256
    tokens = torch.randint(0, 97, (60, 12))
    padding = torch.arange(12) >= torch.tensor(sizes).unsqueeze(1)
    parents = torch.arange(-1, 11).expand(60, -1).masked_fill(padding, PADDING)
    tree, cache = TokenTree(tokens, parents), target.new_cache(60, 40)
    with torch.inference_mode():
        target.extend([[row, 5] for row in range(60)], cache)
        padded = target.run(tree.tokens, None, cache, tree.depth, tree.ancestors).logits
        found = target.forward(tree, cache).logits
    assert found.shape == padded.shape
    assert torch.equal(found[tree.valid], padded[tree.valid])


@pytest.mark.parametrize("nodes", [1, 13, 140])  # of two rows
@pytest.mark.parametrize("kind", ["w8a8", "w4a8", "groups of 8 bits"])
def test_layers_of_activations_in_8_bit_are_in_one_call_what_they_are_in_parts(
    kind: str, nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: what one product gives is tested against float64."""
    if not panels_run():
        pytest.skip("our own kernels do not run here")

    outputs = []
    for whole in (True, False):
        model = make("llama")
        pack_linears(model, functools.partial(laid_out, kind))
        make_lean(model)
        assert all(is_whole(layer) for layer in model.model.layers)
        for layer in () if whole else model.model.layers:
            monkeypatch.setattr(layer.forward, "arguments", None)
        outputs.append(run(HFTarget(model), nodes))
    assert torch.equal(*outputs)


def test_a_forward_that_somebody_replaced_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    target = HFTarget(short(make("llama")))
    before = run(target, 5)
    own = LlamaForCausalLM.forward

    @functools.wraps(own)
    def negated(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = own(self, *args, **kwargs)
        out.logits = -out.logits
        return out

    assert is_stack_and_head(target.model)
    monkeypatch.setattr(LlamaForCausalLM, "forward", negated)
    assert not is_stack_and_head(target.model)
    assert torch.equal(run(target, 5), -before)
    monkeypatch.undo()
    handle = target.model.register_forward_hook(lambda _module, _inputs, _out: None)
    assert not is_stack_and_head(target.model)
    handle.remove()
    assert is_stack_and_head(target.model)

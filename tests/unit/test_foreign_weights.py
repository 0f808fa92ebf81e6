"""Published checkpoints: small files in their layouts draft, and what does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.architectures import VOCAB, tiny_model
from safetensors.torch import save_file
from torch import Tensor

from specdec import SpecDecoder
from specdec.drafters.eagle import EagleConfig, EagleDrafter
from specdec.drafters.foreign import read_foreign
from specdec.drafters.medusa import MedusaConfig, MedusaDrafter
from specdec.drafters.weights import TargetFacts
from specdec.target import HFTarget
from specdec.tree import TokenTree

WIDTH, HEADS, KV_HEADS, HEAD_DIM, WIDE, DRAFT_VOCAB = 64, 4, 2, 16, 96, 40
LAYER = {
    "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
    "intermediate_size": WIDE, "rms_norm_eps": 1e-6, "rope_theta": 5e5, "vocab_size": VOCAB,
}  # fmt: skip


@pytest.fixture(scope="module")
def target() -> HFTarget:
    return HFTarget(tiny_model(num_hidden_layers=4))


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], pickled: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / pickled)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def medusa_tensors(heads: int = 3, layers: int = 2, vocab: int = VOCAB) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {}
    for head in range(heads):
        for layer in range(layers):
            found[f"{head}.{layer}.linear.weight"] = torch.randn(WIDTH, WIDTH) / 8
            found[f"{head}.{layer}.linear.bias"] = torch.randn(WIDTH)
        found[f"{head}.{layers}.weight"] = torch.randn(vocab, WIDTH)
    return found


def eagle_tensors(prefix: str, bias: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    ids = torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, 2 * WIDTH), "self_attn.k_proj": (KV_HEADS * HEAD_DIM, 2 * WIDTH),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, 2 * WIDTH), "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
        "mlp.gate_proj": (WIDE, WIDTH), "mlp.up_proj": (WIDE, WIDTH), "mlp.down_proj": (WIDTH, WIDE),
        "input_layernorm": (WIDTH,), "hidden_norm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
    }  # fmt: skip
    found = {f"{prefix}{name}.weight": torch.randn(shape) / 4 for name, shape in shapes.items()}
    found |= {
        "fc.weight": torch.randn(WIDTH, 3 * WIDTH) / 8, "norm.weight": torch.ones(WIDTH),
        "lm_head.weight": torch.randn(DRAFT_VOCAB, WIDTH), "d2t": ids - torch.arange(DRAFT_VOCAB),
        "t2d": torch.zeros(VOCAB, dtype=torch.bool).index_fill(0, ids, True),
        "embed_tokens.weight": torch.randn(VOCAB, WIDTH),
    }  # fmt: skip
    return found | ({"fc.bias": torch.randn(WIDTH)} if bias else {})


def check_text(target: HFTarget, drafter: Any) -> None:
    plain = SpecDecoder(target, "none").generate([[5, 6, 7], [9]], max_new_tokens=16, ignore_eos=True)
    decoder = SpecDecoder(target, drafter, on_drafter_error="raise", adaptive=False)
    results = decoder.generate([[5, 6, 7], [9]], max_new_tokens=16, ignore_eos=True)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
    assert decoder.stats.drafted > 0


def test_medusa_heads_compute_what_their_authors_do(target: HFTarget, tmp_path: Path) -> None:
    tensors = medusa_tensors()
    config = {"medusa_num_heads": 3, "medusa_num_layers": 2, "base_model_name_or_path": "x/y"}
    folder = write(tmp_path / "m", config, tensors)
    drafter = MedusaDrafter(MedusaConfig(weights=str(folder)))
    drafter.bind(target, None)
    hidden = torch.randn(1, 1, WIDTH)
    drafter.begin(1)
    drafter.absorb({"last": hidden}, torch.tensor([[1]]), [1])
    for head in range(3):
        state = hidden[0, 0]
        for layer in range(2):
            weight, bias = tensors[f"{head}.{layer}.linear.weight"], tensors[f"{head}.{layer}.linear.bias"]
            state = state + torch.nn.functional.silu(weight @ state + bias)
        expected = tensors[f"{head}.2.weight"] @ state
        got = drafter.logits(None, 0, head + 1)[0, 0]  # type: ignore[arg-type]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    check_text(target, MedusaDrafter(MedusaConfig(weights=str(folder))))


@pytest.mark.parametrize("published", ["SafeAILab", "speculators"])
def test_eagle3_is_read_in_both_layouts(target: HFTarget, tmp_path: Path, published: str) -> None:
    if published == "SafeAILab":
        config: dict[str, Any] = {**LAYER, "draft_vocab_size": DRAFT_VOCAB}
        tensors = eagle_tensors("midlayer.")
    else:
        config = {
            "speculators_model_type": "eagle3", "transformer_layer_config": LAYER, "draft_vocab_size": DRAFT_VOCAB,
            "norm_before_residual": True,
        }  # fmt: skip
        tensors = eagle_tensors("layers.0.", bias=True)
    folder = write(tmp_path / "e", config, tensors)
    drafter = EagleDrafter(EagleConfig(weights=str(folder)))
    drafter.bind(target, None)
    module: Any = drafter.module
    assert module.features == (2, 2, 1)
    assert module.norm_before_residual is (published == "speculators")
    assert module.layer.shape.rope_theta == 5e5
    assert torch.equal(module.vocabulary, tensors["t2d"].nonzero().squeeze(1))
    states = torch.randn(1, 2, 3 * WIDTH)
    fused = module.fuse(dict(zip((2, 1), (states[..., :WIDTH], states[..., 2 * WIDTH :]), strict=True)))
    raw = torch.cat([states[..., :WIDTH], states[..., :WIDTH], states[..., 2 * WIDTH :]], dim=-1)
    expected = raw @ tensors["fc.weight"].T + tensors.get("fc.bias", torch.zeros(WIDTH))
    torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-4)
    logits = drafter.output_logits(module.read(fused))
    assert logits.shape == (1, 2, DRAFT_VOCAB)
    check_text(target, EagleDrafter(EagleConfig(weights=str(folder))))


def first_eagle_tensors(prefix: str, fc: str, bias: bool) -> dict[str, Tensor]:
    """EAGLE-1's, or what speculators makes of them."""
    full = eagle_tensors(prefix)
    found = {name: tensor for name, tensor in full.items() if name.startswith(prefix)}
    found = {name: tensor for name, tensor in found.items() if "input_layernorm" not in name and "hidden" not in name}
    for name in "qkv":
        weight = f"{prefix}self_attn.{name}_proj.weight"
        found[weight] = found[weight][:, :WIDTH]
        if bias:
            found[f"{prefix}self_attn.{name}_proj.bias"] = torch.randn(len(found[weight]))
    found[f"{fc}.weight"] = torch.randn(WIDTH, 2 * WIDTH) / 8
    return found | ({f"{fc}.bias": torch.randn(WIDTH)} if bias else {})


@pytest.mark.parametrize("published", ["SafeAILab", "SafeAILab, with biases", "speculators"])
def test_the_first_eagle_is_read_in_both_layouts(target: HFTarget, tmp_path: Path, published: str) -> None:
    bias = "bias" in published
    if published == "speculators":
        config: dict[str, Any] = {
            "speculators_model_type": "eagle", "speculators_config": {"algorithm": "eagle"}, "layernorms": False,
            "transformer_layer_config": LAYER, "fusion_bias": bias,
        }  # fmt: skip
        tensors = first_eagle_tensors("transformer.", "fusion_fc", bias)
        folder = write(tmp_path / "e", config, tensors)
    else:
        config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, **LAYER}
        tensors = first_eagle_tensors("layers.0.", "fc", bias)
        tensors["embed_tokens.weight"] = torch.randn(VOCAB, WIDTH)
        folder = write(tmp_path / "e", config, tensors, "pytorch_model.bin")
    drafter = EagleDrafter(EagleConfig(weights=str(folder), allow_pickle=True))
    drafter.bind(target, None)
    module: Any = drafter.module
    assert tuple(module.features) == ("last",)
    assert module.layer.shape.rope_theta == 5e5
    # A text of one entry attends to itself alone: what is added is its value, however queries and keys are turned.
    prefix, fc = ("transformer.", "fusion_fc.") if published == "speculators" else ("layers.0.", "fc.")
    t = {name.removeprefix(prefix).replace(fc, "fc."): tensor for name, tensor in tensors.items()}
    hidden, none = torch.randn(1, 1, WIDTH), torch.zeros(1)
    drafter.begin(1)
    drafter.absorb({"last": hidden}, torch.tensor([[7]]), [1])
    embedded = target.model.get_input_embeddings().weight[7]
    mixed = t["fc.weight"] @ torch.cat([embedded, hidden[0, 0]]) + t.get("fc.bias", none)
    value = t["self_attn.v_proj.weight"] @ mixed + t.get("self_attn.v_proj.bias", none)
    value = value.view(KV_HEADS, HEAD_DIM).repeat_interleave(HEADS // KV_HEADS, dim=0).flatten()
    state = mixed + t["self_attn.o_proj.weight"] @ value
    normed = torch.nn.functional.rms_norm(state, (WIDTH,), t["post_attention_layernorm.weight"], 1e-6)
    gate = torch.nn.functional.silu(t["mlp.gate_proj.weight"] @ normed)
    state = state + t["mlp.down_proj.weight"] @ (gate * (t["mlp.up_proj.weight"] @ normed))
    expected = target.model.get_output_embeddings().weight @ state
    got = drafter.logits(TokenTree.from_pending(torch.tensor([7])), 0, 1)[0, 0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    check_text(target, EagleDrafter(EagleConfig(weights=str(folder), allow_pickle=True)))


def test_all_medusa_heads_are_read_where_the_configuration_names_fewer(target: HFTarget, tmp_path: Path) -> None:
    """FasterDecoding's own say 2 beside files of 5."""
    folder = write(tmp_path / "m", {"medusa_num_heads": 2, "medusa_num_layers": 1}, medusa_tensors(5, 1))
    weights = read_foreign(folder, TargetFacts.of(target))
    assert weights is not None
    assert weights.shape["num_heads"] == 5


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        ({}, [2, 2, 1]),
        ({"eagle_aux_hidden_state_layer_ids": [2, 3, 4]}, [2, 3, 4]),
        ({"eagle_aux_hidden_state_layer_ids": [2, 3, 4, 5]}, [2, 3, 4]),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]}}, [2, 3, 4]),
    ],
)
def test_layers_are_counted_as_the_configuration_does(
    target: HFTarget, tmp_path: Path, config: dict[str, Any], layers: list[int]
) -> None:
    folder = write(tmp_path / "e", {**LAYER, "draft_vocab_size": DRAFT_VOCAB, **config}, eagle_tensors("midlayer."))
    weights = read_foreign(folder, TargetFacts.of(target))
    assert weights is not None
    assert weights.shape["states"] == layers


def test_a_configuration_may_leave_out_llamas_defaults(target: HFTarget, tmp_path: Path) -> None:
    config = {"transformer_layer_config": {k: v for k, v in LAYER.items() if k != "rms_norm_eps"}}
    config |= {"speculators_model_type": "eagle3", "draft_vocab_size": DRAFT_VOCAB}
    scaling = {"rope_type": "linear", "factor": 4.0}
    config["transformer_layer_config"]["rope_scaling"] = scaling
    weights = read_foreign(write(tmp_path / "e", config, eagle_tensors("layers.0.")), TargetFacts.of(target))
    assert weights is not None
    assert weights.shape["layer"]["norm_eps"] == 1e-6
    assert weights.shape["layer"]["rope_scaling"] == scaling


def test_pickles_are_refused_unless_allowed(target: HFTarget, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"medusa_num_heads": 3, "medusa_num_layers": 2}, medusa_tensors(), "heads.pt")
    with pytest.raises(ValueError, match=r"only in a pickle \(heads\.pt\): pass -o allow_pickle=true"):
        MedusaDrafter(MedusaConfig(weights=str(folder))).bind(target, None)
    check_text(target, MedusaDrafter(MedusaConfig(weights=str(folder), allow_pickle=True)))


class _Runs:
    def __reduce__(self) -> Any:
        return print, ("a pickle ran code",)


def test_nothing_in_a_pickle_is_run(target: HFTarget, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "m", {"medusa_num_heads": 3}, {"0.0.linear.weight": _Runs()}, "heads.pt")  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"heads\.pt cannot be read"):
        MedusaDrafter(MedusaConfig(weights=str(folder), allow_pickle=True)).bind(target, None)
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"medusa_num_heads": 3, "medusa_num_layers": 2}, medusa_tensors(vocab=50), f"vocabulary 50, not {VOCAB}"),
        ({"medusa_num_heads": 4, "medusa_num_layers": 2}, medusa_tensors(), "lacks '3.0.linear.weight'"),
        ({**LAYER, "hidden_size": 32, "draft_vocab_size": 40}, eagle_tensors("midlayer."), "hidden size 32, not 64"),
        ({"architectures": ["LlamaForCausalLM"]}, medusa_tensors(), r"config\.json is of no known layout"),
        ({"speculators_model_type": "dflash", "draft_vocab_size": 40}, eagle_tensors("layers.0."), "no known layout"),
        (
            {**LAYER, "num_hidden_layers": 1, "vocab_size": 50},
            first_eagle_tensors("layers.0.", "fc", bias=False),
            f"vocabulary 50, not {VOCAB}",
        ),
        (
            {**LAYER, "draft_vocab_size": 40},
            {**eagle_tensors("midlayer."), "midlayer.self_attn.q_norm.weight": torch.ones(16)},
            r"'midlayer\.self_attn\.q_norm\.weight' is of a variant that is not supported",
        ),
        (
            {**LAYER, "draft_vocab_size": 40, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            eagle_tensors("midlayer."),
            "its rope_type 'yarn' is not supported; linear, llama3 are",
        ),
        (
            {**LAYER, "draft_vocab_size": 40, "embed_requires_grad": True},
            eagle_tensors("midlayer."),
            "embeddings of its own",
        ),
        (
            {**LAYER, "draft_vocab_size": 40},
            {**eagle_tensors("midlayer."), "d2t": torch.full((DRAFT_VOCAB,), VOCAB)},
            f"names token {VOCAB + DRAFT_VOCAB - 1}, the target has {VOCAB} tokens",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    target: HFTarget, tmp_path: Path, config: dict[str, Any], tensors: dict[str, Tensor], message: str
) -> None:
    folder = write(tmp_path / "f", config, tensors)
    with pytest.raises(ValueError, match=message):
        read_foreign(folder, TargetFacts.of(target))


def test_a_truncated_file_is_named(target: HFTarget, tmp_path: Path) -> None:
    folder = write(tmp_path / "m", {"medusa_num_heads": 3, "medusa_num_layers": 2}, medusa_tensors())
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged or truncated"):
        read_foreign(folder, TargetFacts.of(target))

"""A tiny random Llama with a byte-level tokenizer, and runs made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specdec.benchmarks import mt_bench, roofline
from specdec.benchmarks.schema import Run
from specdec.target import HFTarget


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: index for index, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_model() -> LlamaForCausalLM:
    """A random model over 256 bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, eos_token_id=None, bos_token_id=None, pad_token_id=None,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(autouse=True)
def little_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bandwidth and latency are read once, not often enough to mean anything."""
    bandwidth, curve = roofline.measure_bandwidth, roofline.latency_curve
    monkeypatch.setattr(roofline, "measure_bandwidth", lambda device, size: bandwidth(device, size, repeats=0))
    monkeypatch.setattr(mt_bench, "latency_curve", lambda target: curve(target, repeats=1))


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def target() -> HFTarget:
    """A model of the test's own."""
    return HFTarget(make_model())


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and tokenizer, saved."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make_run() -> Callable[..., Run]:
    """A run of 8 tokens in 4 passes, 100 ms of decoding and 120 ms in all; fields are replaced by keyword."""

    def make(drafter: str = "x", question_id: int = 1, **fields: Any) -> Run:
        values: dict[str, Any] = {
            "repeat": 0, "question_id": question_id, "question_ids": (question_id,), "category": "math", "turn": 1,
            "drafter": drafter, "prompt_tokens": 10, "emitted": 8, "passes": 4, "steps": 4, "drafted": 12,
            "accepted": 4, "accepted_per_pass": {0: 1, 1: 2, 2: 1}, "offered_depth": {3: 4}, "context_tokens": 14.0,
            "milliseconds": {"prefill": 15.0, "draft": 8.0, "target": 80.0, "accept": 4.0, "commit": 2.0, "other": 6.0},
            "first_token_ms": 40.0, "wall_ms": 120.0, "token_sha256": "0" * 64,
        }  # fmt: skip
        return Run(**(values | fields))

    return make

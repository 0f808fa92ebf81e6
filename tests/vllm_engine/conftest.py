"""Without vLLM in the environment these tests are skipped: ``make vllm-test`` makes one that has it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import tiny

from specdec.target import HFTarget

HAS_VLLM = importlib.util.find_spec("vllm") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is in this folder."""
    if HAS_VLLM:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make vllm-test"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models, weights and vLLM's logs are."""
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def tiny_target(folder: Path) -> HFTarget:
    """The tiny model, saved to ``folder/model``."""
    return tiny.make_model(folder / "model")


@pytest.fixture(scope="session")
def tiny_options(tiny_target: HFTarget, folder: Path) -> dict[str, dict[str, object]]:
    """Drafters for it, and their options."""
    for name in ("medusa", "clover", "eagle"):
        tiny.make_drafter(tiny_target, name, folder / name)
    trained = {name: {"weights": str(folder / name)} for name in ("medusa", "clover", "eagle")}
    return {
        "ngram": {},
        "suffix": {"corpus_tokens": 0},
        **trained,
        "model": {"model": str(folder / "model")},
        "recycling": {},
    }

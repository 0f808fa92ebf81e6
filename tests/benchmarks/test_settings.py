"""What is asked for is checked before anything runs, and a lossy policy is marked."""

from __future__ import annotations

import pytest

from specdec.benchmarks.peer_settings import PeerSettings
from specdec.benchmarks.settings import Settings
from specdec.cli.bench.mt_bench import make_specs
from specdec.cli.bench.screen import lossy_lines


def make_settings(**changes: object) -> Settings:
    return Settings(**{"model": "m", "dtype": "float32", "device": "cpu", "drafters": (), **changes})  # type: ignore[arg-type]


def test_a_negative_seed_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        make_settings(seed=-1)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        PeerSettings(model="m", seed=-1)


@pytest.mark.parametrize(("verifier", "lossless"), [("auto", True), ("rejection", True), ("typical", False)])
def test_a_lossy_policy_is_marked(verifier: str, lossless: bool) -> None:
    settings = make_settings(verifier=verifier, temperature=0.8).to_json()
    assert settings["lossless"] is lossless
    marked = ["LOSSY: policy 'typical' writes other texts than the target would"]
    assert lossy_lines(settings) == ([] if lossless else marked)


def test_options_of_auto_go_by_either_name() -> None:
    for name in ("auto", "suffix"):
        (spec,) = make_specs(["auto"], [f"{name}.max_nodes=4"], "suffix")
        assert (spec.name, spec.options) == ("suffix", {"max_nodes": "4"})
    with pytest.raises(ValueError, match="unknown drafter of -o 'ngram'"):
        make_specs(["auto"], ["ngram.max_nodes=4"], "suffix")

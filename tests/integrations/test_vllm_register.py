"""What the plugin says of a vLLM whose model runner is another one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import specdec.integrations.vllm as plugin
from specdec.integrations.vllm import hooks


def test_register_says_what_of_the_model_runner_is_gone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "vllm"
    (package / "v1" / "worker").mkdir(parents=True)
    for folder in (package, package / "v1", package / "v1" / "worker"):
        (folder / "__init__.py").write_text("__version__ = '9'\n")
    (package / "config.py").write_text(
        "import types\nfrom typing import Literal\n"
        "speculative = types.SimpleNamespace(SpeculativeMethod=Literal['ngram', 'custom_class'])\n"
    )
    runner = package / "v1" / "worker" / "gpu_model_runner.py"
    runner.write_text("raise RuntimeError('nobody may import this')\n" + "".join(f"def {n}(\n" for n in plugin.HOOKS))
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(plugin, "_said", set())
    try:
        plugin.register()
        assert not caplog.records
        runner.write_text(f"def {hooks.STEPS}(\ndef {hooks.LOGITS}(\n")
        plugin.register()
        plugin.register()
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            del sys.modules[name]
    assert len(caplog.records) == 1
    assert f"without {hooks.STATES}, drafters that read hidden states" in caplog.text
    assert hooks.LOGITS not in caplog.text

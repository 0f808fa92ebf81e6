"""How vLLM finds the plugin, and what loading it does."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

from run_vllm import ENVIRONMENT

SCRIPT = """
import logging
records = []
class Kept(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner
from specdec.integrations.vllm import hooks
names = (hooks.STEPS, hooks.LOGITS, hooks.STATES)
before = [getattr(Runner, name) for name in names]
logging.getLogger("vllm.specdec").addHandler(Kept())
import vllm.plugins
loaded = vllm.plugins.load_plugins_by_group("vllm.general_plugins")
assert loaded["specdec"].__module__ == "specdec.integrations.vllm", loaded
vllm.plugins.load_general_plugins()
vllm.plugins.load_general_plugins()
loaded["specdec"]()
assert [getattr(Runner, name) for name in names] == before, "registering changes nothing of vLLM"
assert not records, records
first = hooks.install()
wrapped = [getattr(Runner, name) for name in names]
assert first == set(names) and hooks.install() == first
assert [getattr(Runner, name) for name in names] == wrapped, "wrapped twice"
assert wrapped != before
assert not records, records
print("PASSED")
"""


def test_vllm_finds_the_plugin() -> None:
    points = {point.name: point.value for point in entry_points(group="vllm.general_plugins")}
    assert points["specdec"] == "specdec.integrations.vllm:register"


def test_loading_it_again_and_again_is_silent_and_hooks_are_wrapped_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "PASSED" in done.stdout

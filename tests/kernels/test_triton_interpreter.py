"""The numeric suite of the Triton kernels in Triton's interpreter, which has to be chosen before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch


def _fits_numpy() -> bool:
    """Triton 3.6's interpreter reads numbers in a way that numpy 2.4 no longer allows."""
    triton, numpy = (tuple(int(n) for n in version(name).split(".")[:2]) for name in ("triton", "numpy"))
    return triton >= (3, 7) or numpy < (2, 4)


FILES = sorted((Path(__file__).parent / "numeric").glob("test_*.py"))

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: pip install 'specdec[triton]'"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the numeric suite runs in this process"),
    pytest.mark.skipif(
        find_spec("triton") is not None and not _fits_numpy(),
        reason="Triton 3.6's interpreter needs numpy < 2.4",
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the numeric suite runs compiled in this process"),
]


Suite = Future[subprocess.CompletedProcess[str]]


def run_suite(file: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def suites(request: pytest.FixtureRequest) -> Iterator[dict[Path, Suite]]:
    """Those asked for, each on a core of its own: they take longest of all tests."""
    asked = [item.callspec.params["file"] for item in request.session.items if item.path == Path(__file__)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(run_suite, file) for file in asked}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_numeric_suite(suites: dict[Path, Suite], file: Path) -> None:
    run = suites[file].result()
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout

"""Options of the test run."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much of MT-Bench is compared with ``model.generate``; ``--mt-bench-questions 10 --mt-bench-tokens 128``."""
    parser.addoption("--mt-bench-questions", type=int, default=2, help="first turns compared (default 2)")
    parser.addoption("--mt-bench-tokens", type=int, default=32, help="new tokens per question (default 32)")

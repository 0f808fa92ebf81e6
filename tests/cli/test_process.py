"""What only a process of its own shows: imports, signals, exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import specdec

ROOT = Path(specdec.__file__).resolve().parent.parent
HEAVY = ("triton", "flash_attn", "vllm")
# A shell that starts the tests in the background makes them ignore SIGINT, and a child inherits that.
CLI = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from specdec.cli import main; main()"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_specdec_loads_no_optional_or_modelling_code() -> None:
    code = "import sys, time; t = time.perf_counter(); import specdec; print(time.perf_counter() - t, *sys.modules)"
    seconds, *modules = python(code).split()
    assert not {name.partition(".")[0] for name in modules} & set(HEAVY)
    assert not [name for name in modules if name.endswith((".modeling_llama", ".modeling_auto"))]
    assert len(modules) < 3000
    assert float(seconds) < 30.0  # loose: a loaded machine must not fail this


def test_the_help_page_loads_neither_torch_nor_a_model() -> None:
    """The package's own ``__init__`` is replaced, so this is about what the CLI imports."""
    code = (
        "import sys, types; package = types.ModuleType('specdec'); package.__path__ = [sys.argv.pop(1)]\n"
        "sys.modules['specdec'] = package\n"
        "from specdec.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "for command in ('generate', 'chat', 'list', 'demo'): main([command, '--help'], standalone_mode=False)\n"
        "print('loaded', *{name.partition('.')[0] for name in sys.modules})"
    )
    output = python(code, str(ROOT / "specdec"))
    assert "generate" in output
    loaded = set(output.splitlines()[-1].split())
    assert not loaded & {*HEAVY, "torch", "transformers", "numpy", "rich"}


def interrupt(*arguments: str, stdin: str = "", then: str = "") -> tuple[int, str, str]:
    """Start ``specdec``, send SIGINT after the first text, go on with ``then``; exit status, stdout, stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLI, *arguments],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(stdin)
        process.stdin.flush()
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(then, timeout=120)
        return process.returncode, first + rest, errors


LONG = ("-d", "ngram", "-t", "16000", "--threads", "1")


def test_ctrl_c_keeps_the_text_and_exits_with_130(chat_folder: str) -> None:
    code, text, errors = interrupt("generate", "Hello", "-m", chat_folder, *LONG)
    assert code == 130, errors
    assert 2 <= len(text) < 16000
    assert text.endswith("\n")
    assert "tok/s" in errors
    assert "Traceback" not in errors


def test_ctrl_c_in_chat_ends_the_answer_only(chat_folder: str) -> None:
    code, text, errors = interrupt("chat", "-m", chat_folder, *LONG, stdin="One\n", then="/stats\n/exit\n")
    assert code == 0, errors
    assert 2 <= len(text) < 16000
    assert text.endswith("\n")
    assert "tok/s" in errors

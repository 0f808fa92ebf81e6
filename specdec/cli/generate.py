"""``specdec generate``: complete or answer one prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from specdec.cli import INTERRUPTED
from specdec.cli.console import TextPrinter, note, slow_status, summary
from specdec.cli.options import (
    ModelOptions,
    load_decoder,
    make_params,
    model_options,
    sampling_options,
    system_option,
)

if TYPE_CHECKING:
    from specdec.decoder import SpecDecoder
    from specdec.prompts import Prompt
    from specdec.result import GenerationResult, GenerationStream


@click.command()
@click.argument("prompt", required=False)
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Read the prompt from a UTF-8 file.")
@click.option("--raw/--chat", "raw", default=None, help="Complete the text as it is, or answer it as a chat message.")
@click.option("-n", "--n", type=int, default=1, show_default=True, help="Completions.")
@click.option("--logprobs", is_flag=True, help="Add each token's log-probability; needs --json.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else on stdout.")
@system_option
@sampling_options
@model_options
def generate(
    prompt: str | None,
    file: Path | None,
    raw: bool | None,
    n: int,
    logprobs: bool,
    as_json: bool,
    system: str | None,
    sampling: dict[str, Any],
    options: ModelOptions,
) -> None:
    """Complete or answer PROMPT; "-" reads it from stdin.

    A model with a chat template answers, any other completes; --raw and --chat choose. On a terminal accepted draft
    tokens are green. A summary goes to stderr. Ctrl-C ends with the text so far and exit status 130.
    """
    if logprobs and not as_json:
        raise click.UsageError("--logprobs needs --json")
    text = read_prompt(prompt, file)
    params = make_params({**sampling, "n": n, "logprobs": logprobs})
    decoder = load_decoder(options)
    with decoder.stream(make_prompt(decoder, text, system, raw), params) as stream:
        interrupted = run_stream(stream, live=n == 1 and not as_json)
    results = stream.results
    if as_json:
        documents = [to_json(result) for result in results]
        document = documents[0] if n == 1 else {"completions": documents, "stats": stream.stats.to_json()}
        click.echo(json.dumps({"model": options.model, **document}))
    elif n > 1:
        printer = TextPrinter()
        for result in results:
            click.echo(f"[{result.completion_index + 1}/{n}]")
            printer.finish(result.text)
    if not as_json:
        note(summary(stream.stats))
    if interrupted:
        raise SystemExit(INTERRUPTED)
    failed = next((result.error for result in results if result.error), None)
    if failed:
        raise click.ClickException(failed)


def run_stream(stream: GenerationStream, live: bool) -> bool:
    """Read a stream to its end, printing it if ``live``; True when Ctrl-C ended it, with the text so far printed."""
    if not live:
        return _run_silently(stream)
    printer = TextPrinter()
    interrupted = False
    try:
        with slow_status("reading the prompt"):
            first = next(stream, None)
        if first is not None:
            printer.write(first.text, first.from_draft)
        for piece in stream:
            printer.write(piece.text, piece.from_draft)
    except KeyboardInterrupt:
        interrupted = True
    printer.finish(stream.result.text)
    return interrupted


def _run_silently(stream: GenerationStream) -> bool:
    """Read a stream to its end, counting tokens on a terminal's stderr; True when Ctrl-C ended it."""
    try:
        with slow_status("generating") as say:
            for count, _ in enumerate(stream, start=1):
                say(f"generating: {count} tokens")
    except KeyboardInterrupt:
        return True
    return False


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, a file, or stdin.

    Raises:
        ValueError: for none or two of them, a file that cannot be read, or bytes that are not UTF-8.
    """
    if (prompt is None) == (file is None):
        raise click.UsageError("give one prompt: as PROMPT, as '-' for stdin, or with --file")
    if file is not None:
        try:
            return decode_utf8(file.read_bytes(), str(file))
        except OSError as error:
            raise ValueError(f"cannot read {str(file)!r}: {error.strerror}") from error
    if prompt == "-":
        return decode_utf8(sys.stdin.buffer.read(), "stdin")
    return str(prompt)


def decode_utf8(data: bytes, source: str) -> str:
    """Bytes as text, without a byte order mark; raises ValueError naming the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = data[error.start]
        raise ValueError(f"{source} is not UTF-8: byte 0x{byte:02x} at offset {error.start}") from error


def make_prompt(decoder: SpecDecoder, text: str, system: str | None, raw: bool | None) -> Prompt:
    """The text itself, or chat messages where the model has a template and nothing else was asked for."""
    if raw is None:
        raw = not getattr(decoder.tokenizer, "chat_template", None)
    if raw and system is not None:
        raise ValueError("--system needs a chat: the text is completed as it is here")
    if raw:
        return text
    if not text.strip():
        raise ValueError("the prompt is empty: give some text")
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": text}]


def to_json(result: GenerationResult) -> dict[str, Any]:
    """Plain values of one completion, ready for ``json.dumps``."""
    return {
        "text": result.text,
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "error": result.error,
        "prompt_len": result.prompt_len,
        "logprobs": result.logprobs,
        "stats": result.stats.to_json(),
    }

"""Worker for llama.cpp through llama-cpp-python's bindings of its C interface.

The loop calls `llama_decode` itself instead of `Llama.generate`, which does much in Python around every token: at 5 ms
a token that would time the wrapper, not llama.cpp. Lookup drafts by the rule of llama.cpp's "ngram-simple", which is
not in the library that the bindings reach. The package's own `LlamaPromptLookupDecoding` falls back to matching single
tokens; their drafts are kept so seldom that they cost more than they bring.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._protocol import Clock, Options, Reply, Request, cut_at_eos, serve
else:
    from _protocol import Clock, Options, Reply, Request, cut_at_eos, serve

GGML_TYPE_F32 = 0
PROMPT_BATCH = 2048
# llama.cpp's name of an instruction set -> the Linux kernel's name of it.
INSTRUCTION_SETS = {
    "AVX2": "avx2",
    "AVX512": "avx512f",
    "AVX512_VNNI": "avx512_vnni",
    "AVX512_BF16": "avx512_bf16",
    "AMX_INT8": "amx_int8",
}


class LlamaCppEngine:
    """A GGUF file loaded into one context with one sequence."""

    def __init__(self, options: Options) -> None:
        if options.speculation == "assisted":
            raise ValueError("speculation must be none or lookup for llama.cpp, got 'assisted'")
        import llama_cpp
        import numpy as np

        self._lib, self._np = llama_cpp, np
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(options.weights.encode(), llama_cpp.llama_model_default_params())
        if model is None:
            raise ValueError(f"llama.cpp cannot load {options.weights!r}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = options.max_context
        params.n_batch = PROMPT_BATCH
        params.n_threads = params.n_threads_batch = options.threads
        if options.precision == "fp32":
            params.type_k = params.type_v = GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(model, params)
        if self._context is None:
            raise ValueError(f"llama.cpp cannot make a context of {options.max_context} tokens for {options.weights!r}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(PROMPT_BATCH, 0, 1)
        self._max_context = options.max_context
        self._vocab_len = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._lookup = options.speculation == "lookup"
        self._ngram_len, self._draft_len = options.max_ngram, options.draft_len
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self.notes = build_notes(llama_cpp.llama_print_system_info().decode(), _processor_flags())

    def generate(self, request: Request) -> Reply:
        """See `Engine.generate`."""
        prompt_len = len(request.prompt_ids)
        if prompt_len + request.max_new_tokens > self._max_context:
            wanted = f"{prompt_len} + {request.max_new_tokens}"
            raise ValueError(f"prompt and new tokens are {wanted}, more than the context of {self._max_context}")
        self._lib.llama_memory_clear(self._memory, False)
        text = self._np.empty(self._max_context, dtype=self._np.intc)  # prompt and output so far, the drafter's input
        text[:prompt_len] = request.prompt_ids
        clock = Clock()
        emitted = self._prefill(request.prompt_ids)
        clock.arrived(1)
        end, drafted, passes = prompt_len + 1, 0, 0
        text[prompt_len] = emitted
        while end - prompt_len < request.max_new_tokens and int(text[end - 1]) not in request.eos_ids:
            draft = self._propose(text, end, request.max_new_tokens - (end - prompt_len) - 1)
            choices = self._decode([int(text[end - 1]), *draft], end - 1, every_row=True)
            # Drafted tokens are kept while each is what the model chose there; then the model's own choice follows.
            num_kept = next((i for i, token in enumerate(draft) if token != choices[i]), len(draft))
            kept = cut_at_eos(choices[: num_kept + 1], request)
            if num_kept < len(draft):
                self._lib.llama_memory_seq_rm(self._memory, 0, end + num_kept, -1)
            text[end : end + len(kept)] = kept
            end += len(kept)
            drafted += len(draft)
            passes += 1
            clock.arrived(len(kept))
        num_tokens = end - prompt_len
        if not self._lookup:
            return clock.reply(text[prompt_len:end].tolist())
        return clock.reply(text[prompt_len:end].tolist(), drafted, num_tokens - 1 - passes)

    def _prefill(self, prompt_ids: list[int]) -> int:
        choice = 0
        for start in range(0, len(prompt_ids), PROMPT_BATCH):
            choice = self._decode(prompt_ids[start : start + PROMPT_BATCH], start, every_row=False)[-1]
        return choice

    def _propose(self, text: Any, end: int, room: int) -> list[int]:
        """What followed the last n tokens of `text[:end]` when they last occurred, at most `room` tokens of it."""
        num_tokens, ngram_len = min(self._draft_len, room), self._ngram_len
        if not self._lookup or num_tokens < 1 or end <= ngram_len:
            return []
        earlier = self._np.lib.stride_tricks.sliding_window_view(text[: end - 1], ngram_len)
        starts = (earlier == text[end - ngram_len : end]).all(axis=1).nonzero()[0]
        if not len(starts):
            return []
        after = int(starts[-1]) + ngram_len
        draft: list[int] = text[after : min(after + num_tokens, end)].tolist()
        return draft

    def _decode(self, tokens: list[int], position: int, every_row: bool) -> list[int]:
        """One pass over `tokens` from `position` on; the likeliest next token of every row, or of the last alone."""
        batch, num_rows = self._batch, len(tokens)
        batch.n_tokens = num_rows
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every_row or i == num_rows - 1
        status = self._lib.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} for {num_rows} tokens at position {position}")
        num_outputs = num_rows if every_row else 1
        pointer = ctypes.cast(self._lib.llama_get_logits(self._context), ctypes.POINTER(ctypes.c_float))
        logits = self._np.ctypeslib.as_array(pointer, shape=(num_outputs, self._vocab_len))
        choices: list[int] = logits.argmax(axis=1).tolist()
        return choices


def build_notes(system_info: str, processor_flags: set[str]) -> list[str]:
    """A sentence where this llama.cpp leaves instructions of the processor unused, which makes it no fair peer."""
    enabled = [part.partition(" = ")[0].strip() for part in system_info.split("|") if " = 1" in part]
    built = {name.removeprefix("CPU : ") for name in enabled}
    unused = [ours for ours, kernels in INSTRUCTION_SETS.items() if kernels in processor_flags and ours not in built]
    if not unused:
        return []
    return [f"llama.cpp was built without {', '.join(unused)}, which this processor has: build it from source here"]


def _processor_flags() -> set[str]:
    """The processor's instruction sets as Linux names them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


if __name__ == "__main__":
    serve(LlamaCppEngine)

"""Worker for vLLM on the CPU: its V1 engine in this very process, stepped by hand so that each arrival can be timed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._protocol import Clock, Options, Reply, Request, cut_at_eos, serve
else:
    from _protocol import Clock, Options, Reply, Request, cut_at_eos, serve

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
KV_CACHE_GIB = 1
MIN_NGRAM = 2  # left out, it would be the longest too, and hardly ever match


class VllmEngine:
    """A model folder in vLLM, compiled as vLLM does by default, one sequence at a time, no prefix cache."""

    def __init__(self, options: Options) -> None:
        if options.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {options.precision!r}")
        if options.speculation == "assisted":
            raise ValueError("speculation must be none or lookup for vLLM, got 'assisted'")
        # vLLM takes these from its environment alone. Threads that it binds to processors are no faster where nothing
        # else runs, and fall under a token a second where something does; by default it also leaves a processor unused.
        os.environ.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_CPU_OMP_THREADS_BIND="nobind",
            VLLM_CPU_KVCACHE_SPACE=str(KV_CACHE_GIB),
            VLLM_NO_USAGE_STATS="1",
            HF_HUB_OFFLINE="1",
            OMP_NUM_THREADS=str(options.threads),
        )
        import vllm

        speculative = None
        if options.speculation == "lookup":
            speculative = {
                "method": "ngram",
                "num_speculative_tokens": options.draft_len,
                "prompt_lookup_min": min(MIN_NGRAM, options.max_ngram),
                "prompt_lookup_max": options.max_ngram,
            }
        llm = vllm.LLM(
            model=options.weights,
            dtype=PRECISIONS[options.precision],
            max_model_len=options.max_context,
            max_num_seqs=1,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            generation_config="vllm",  # not the folder's: its sampling settings would change greedy decoding
            speculative_config=speculative,
            disable_log_stats=False,
            seed=0,
        )
        self._vllm = vllm
        self._engine = llm.llm_engine
        self._num_requests = 0
        self.version = vllm.__version__
        self.notes: list[str] = []

    def generate(self, request: Request) -> Reply:
        """See `Engine.generate`."""
        params = self._vllm.SamplingParams(
            temperature=0.0,
            max_tokens=request.max_new_tokens,
            stop_token_ids=request.eos_ids,
            ignore_eos=True,  # the ids that end the text are the request's alone
            detokenize=False,
        )
        self._num_requests += 1
        before = self._counters()
        clock = Clock()
        self._engine.add_request(str(self._num_requests), {"prompt_token_ids": request.prompt_ids}, params)
        token_ids: list[int] = []
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                now = list(output.outputs[0].token_ids)
                if len(now) > len(token_ids):
                    clock.arrived(len(now) - len(token_ids))
                    token_ids = now
        after = self._counters()
        drafted, accepted = (after.get(key, 0) - before.get(key, 0) for key in ("draft_tokens", "accepted_tokens"))
        known = bool(after)
        return clock.reply(cut_at_eos(token_ids, request), drafted if known else None, accepted if known else None)

    def _counters(self) -> dict[str, int]:
        """vLLM's own running totals of speculation; empty without it."""
        prefix = "vllm:spec_decode_num_"
        metrics: list[Any] = self._engine.get_metrics()
        counters = [metric for metric in metrics if metric.name.startswith(prefix) and hasattr(metric, "value")]
        return {counter.name.removeprefix(prefix): counter.value for counter in counters}


if __name__ == "__main__":
    serve(VllmEngine)

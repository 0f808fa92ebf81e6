"""Worker for OpenVINO GenAI's LLM pipeline on the CPU, plain and with its prompt lookup."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._protocol import Options, Reply, Request, cut_at_eos, serve
else:
    from _protocol import Options, Reply, Request, cut_at_eos, serve

# Precision of the peer -> what OpenVINO computes with and keeps keys and values in. It chooses both for int8 and int4,
# which are how the weights are stored in the model's folder.
INFERENCE_PRECISION = {"fp32": "f32", "bf16": "bf16", "int8": "", "int4": ""}
KV_CACHE_GIB = 1


class OpenVinoEngine:
    """A folder with OpenVINO's form of a model, in a pipeline without prefix cache."""

    def __init__(self, options: Options) -> None:
        if options.precision not in INFERENCE_PRECISION:
            raise ValueError(f"precision must be one of {', '.join(INFERENCE_PRECISION)}, got {options.precision!r}")
        if options.speculation == "assisted":
            raise ValueError("speculation must be none or lookup for OpenVINO, got 'assisted'")
        import openvino
        import openvino_genai

        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = 1
        scheduler.cache_size = KV_CACHE_GIB
        properties = {
            "INFERENCE_NUM_THREADS": options.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "scheduler_config": scheduler,
        }
        inference_precision = INFERENCE_PRECISION[options.precision]
        if inference_precision:
            properties["INFERENCE_PRECISION_HINT"] = properties["KV_CACHE_PRECISION"] = inference_precision
        self._lookup = options.speculation == "lookup"
        if self._lookup:
            properties["prompt_lookup"] = True
        self._options = options
        self._genai = openvino_genai
        self._tensor = openvino.Tensor
        self._pipeline = openvino_genai.LLMPipeline(options.weights, "CPU", properties)
        self.version = openvino_genai.__version__
        self.notes: list[str] = []

    def generate(self, request: Request) -> Reply:
        """See `Engine.generate`."""
        import numpy as np

        config = self._genai.GenerationConfig()
        config.max_new_tokens = request.max_new_tokens
        config.do_sample = False
        config.apply_chat_template = False
        if request.eos_ids:
            config.eos_token_id = request.eos_ids[0]
            config.stop_token_ids = set(request.eos_ids)
        else:
            config.ignore_eos = True
        if self._lookup:
            config.num_assistant_tokens = self._options.draft_len
            config.max_ngram_size = self._options.max_ngram
        prompt = self._tensor(np.array([request.prompt_ids], dtype=np.int64))
        result = self._pipeline.generate(prompt, config)
        # Microseconds. The durations are per token (a pass that brought several is split evenly), the times per pass.
        raw = result.perf_metrics.raw_metrics
        return Reply(
            token_ids=cut_at_eos([int(token) for token in result.tokens[0]], request),
            prefill_ms=raw.m_times_to_first_token[0] / 1e3,
            decode_ms=sum(raw.m_durations) / 1e3,
            passes=len(raw.m_new_token_times) - 1,
        )


if __name__ == "__main__":
    serve(OpenVinoEngine)

"""Worker for transformers: plain, prompt-lookup and assisted generation through `model.generate`."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._protocol import Clock, Options, Reply, Request, serve
else:
    from _protocol import Clock, Options, Reply, Request, serve

PRECISIONS = ("fp32", "bf16")


class TransformersEngine:
    """A model folder loaded with `AutoModelForCausalLM` on the CPU."""

    def __init__(self, options: Options) -> None:
        if options.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {options.precision!r}")
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        torch: Any = importlib.import_module("torch")
        transformers: Any = importlib.import_module("transformers")
        torch.set_num_threads(options.threads)
        transformers.logging.set_verbosity_error()
        self._torch, self._transformers = torch, transformers
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]
        self._model = self._load(options.weights)
        self._mode: dict[str, Any] = {}
        if options.speculation == "lookup":
            self._mode = {"prompt_lookup_num_tokens": options.draft_len, "max_matching_ngram_size": options.max_ngram}
        elif options.speculation == "assisted":
            self._mode = {"assistant_model": self._load(options.draft_model)}
        self._clock = Clock()
        self._seen = 0
        self.version = transformers.__version__
        self.notes: list[str] = []

    def _load(self, folder: str) -> Any:
        model = self._transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=self._dtype, local_files_only=True
        )
        model.eval()
        # The folder's own sampling settings would otherwise fill the gaps of the request's.
        model.generation_config = self._transformers.GenerationConfig()
        return model

    def _note_arrival(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """A stopping criterion that never stops: `generate` calls it once after every pass."""
        self._clock.arrived(input_ids.shape[1] - self._seen)
        self._seen = input_ids.shape[1]
        return self._torch.zeros(input_ids.shape[0], dtype=self._torch.bool)

    def generate(self, request: Request) -> Reply:
        """See `Engine.generate`."""
        prompt = self._torch.tensor([request.prompt_ids])
        self._seen = prompt.shape[1]
        self._clock = Clock()
        with self._torch.inference_mode():
            output = self._model.generate(
                prompt,
                attention_mask=self._torch.ones_like(prompt),
                max_new_tokens=request.max_new_tokens,
                do_sample=False,
                eos_token_id=request.eos_ids or None,
                pad_token_id=request.eos_ids[0] if request.eos_ids else 0,
                stopping_criteria=[self._note_arrival],
                **self._mode,
            )
        return self._clock.reply(output[0, prompt.shape[1] :].tolist())


if __name__ == "__main__":
    serve(TransformersEngine)

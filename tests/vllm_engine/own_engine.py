"""Our own engine on chains, as vLLM checks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from run_vllm import K

from specdec import SpecDecoder
from specdec.batch import Batch
from specdec.integrations.vllm.chains import best_chain
from specdec.integrations.vllm.settings import chain_options
from specdec.registry import create_drafter
from specdec.target import HFTarget
from specdec.tree import TokenTree


class OwnEngine:
    """Decodes with a drafter whose trees are cut down to their best chain of K tokens.

    Args:
        target: the model.
        name: of the drafter.
        options: of it.
    """

    def __init__(self, target: HFTarget, name: str, options: Mapping[str, Any]) -> None:
        drafter: Any = create_drafter(name, chain_options(name, options, K))
        propose = drafter.propose

        def propose_chain(batch: Batch) -> TokenTree:
            tree = propose(batch)
            most = min(K, batch.rows[0].max_depth)
            nodes = [int(tree.tokens[0, 0]), *best_chain(tree, 0, most, target.vocab_size)]
            return TokenTree(torch.tensor([nodes]), torch.arange(len(nodes)).unsqueeze(0) - 1)

        drafter.propose = propose_chain
        self._decoder = SpecDecoder(target, drafter, adaptive=False, on_drafter_error="raise")

    def accepted(self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> int:
        """Drafted tokens accepted while it writes these texts, which it must, to these prompts.

        vLLM's prompt pass gives a token without a draft; here decoding begins with that token.
        """
        total = 0
        for prompt, text in zip(prompts, texts, strict=True):
            result = self._decoder.generate([*prompt, text[0]], max_new_tokens=len(text) - 1, ignore_eos=True)
            assert result.token_ids == list(text[1:])
            total += result.stats.emitted - result.stats.passes
        return total

"""What a verdict adds to the rows: tokens, text and counts, up to where each ends."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from specdec.batch import Batch
from specdec.result import StreamPiece
from specdec.stats import DecodeStats
from specdec.tree import TokenTree
from specdec.verifiers.base import Verdict


def emit(
    batch: Batch, tree: TokenTree, logits: Tensor, verdict: Verdict, index_of: Mapping[int, int], stats: DecodeStats
) -> list[StreamPiece]:
    """Append what was accepted to the rows.

    Args:
        batch: its rows, their text, reasons to end and counts are changed.
        tree: that was checked, ``[B, N]``.
        logits: the target's, ``[B, N, V]``, for log-probabilities.
        verdict: on it; a row that failed is ended.
        index_of: from a row's id to the index its pieces carry.
        stats: of all rows together; changed.
    """
    pieces = []
    for counted in (stats, *(row.stats for row in batch.rows)):
        counted.steps += 1
    drafts = tree.drafts if tree.num_nodes > 1 else [(0, 0)] * len(batch)
    for index, row in enumerate(batch.rows):
        accepted, piece_index = verdict.num_accepted[index], index_of[row.row_id]
        for counted in (stats, row.stats):
            counted.count_pass(drafts[index], accepted, plain=tree.num_nodes == 1)
        start = len(row.tokens)
        for offset, token in enumerate(verdict.tokens[index]):
            text = row.push(token)
            pieces.append(StreamPiece(text, token, offset < accepted, piece_index))
            if row.finish_reason is not None:
                break
        if verdict.failed[index] and row.finish_reason is None:
            step = row.stats.passes
            held = row.fail(f"the target returned NaN logits at step {step}; the text up to it is kept")
            if held:
                pieces.append(StreamPiece(held, None, False, piece_index))
        new = row.tokens[start:]
        stats.emitted += len(new)
        batch.mark_seen(index, new)
        row.noise.forget_before(len(row.tokens))
        if row.params.logprobs and new:
            nodes = logits[index, verdict.path[index, : len(new)]].float().log_softmax(-1)
            chosen = torch.tensor(new, device=logits.device).unsqueeze(1)
            row.logprobs += nodes.gather(1, chosen).squeeze(1).tolist()
    return pieces

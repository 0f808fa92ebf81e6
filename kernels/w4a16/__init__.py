"""Products with a weight in 4 bits, activations in 16. See README.md for the mathematics and the layouts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from specdec.kernels import device_of, runs_triton
from specdec.kernels.w4a16 import cpu, reference
from specdec.kernels.w4a16.choice import ROWS, ChoiceTable, measure
from specdec.kernels.w4a16.layouts import from_awq, from_gptq, from_q4_1
from specdec.kernels.w4a16.weight import Int4Weight, from_dense

__all__ = [
    "ChoiceTable", "Int4Weight", "from_awq", "from_dense", "from_gptq", "from_q4_1", "measure_choices", "w4a16",
]  # fmt: skip


def w4a16(
    inputs: Tensor, weight: Int4Weight, table: ChoiceTable | None = None, implementation: str | None = None
) -> Tensor:
    """``inputs @ weight.T`` with the weight in 4-bit codes.

    Args:
        inputs: ``[..., K]``.
        weight: of a linear layer with N outputs.
        table: which implementation was measured to be fastest; without it, or for shapes it does not know, a rule by
            the number of rows decides.
        implementation: one by name, whatever the table says.

    Returns:
        ``[..., N]`` in the inputs' type.

    Raises:
        ValueError: where the inputs do not fit the weight or are on another device, or the name is unknown.
    """
    if inputs.shape[-1] != weight.num_inputs or not inputs.is_floating_point():
        raise ValueError(
            f"inputs must be floating point [..., {weight.num_inputs}], got {tuple(inputs.shape)} {inputs.dtype}"
        )
    if inputs.device != weight.codes.device:
        raise ValueError(f"inputs are on {inputs.device}, the weight on {weight.codes.device}")
    rows = inputs.reshape(-1, weight.num_inputs)
    if implementation is None and table is not None:
        implementation = table.best(weight, inputs.dtype, len(rows))
    return _run(rows, weight, implementation).view(*inputs.shape[:-1], weight.num_outputs)


def measure_choices(
    weight: Int4Weight, dtype: torch.dtype, table: ChoiceTable, rows: Sequence[int] = ROWS, rounds: int = 9
) -> None:
    """Measure the implementations on the weight's device and enter the fastest in the table."""
    table.add(weight, dtype, measure(weight, dtype, _run, lambda count: _candidates(weight, count), rows, rounds))


def _candidates(weight: Int4Weight, num_rows: int) -> Sequence[str]:
    if runs_triton(weight.codes):
        from specdec.kernels.w4a16 import triton

        return triton.candidates(num_rows)
    return cpu.IMPLEMENTATIONS


def _run(inputs: Tensor, weight: Int4Weight, implementation: str | None) -> Tensor:
    if inputs.dtype != torch.float64:
        if runs_triton(inputs):
            from specdec.kernels.w4a16 import triton

            with device_of(inputs):
                return triton.w4a16(inputs, weight, implementation or triton.default(len(inputs), weight))
        if inputs.device.type == "cpu":
            return cpu.w4a16(inputs, weight, implementation or cpu.default(len(inputs)))
    return reference.w4a16(inputs, weight)

"""Muon for matrices, AdamW for the rest."""

from __future__ import annotations

import pytest
import torch

from specdec.training.optimizer import MuonAdamW, orthogonal


@pytest.mark.parametrize("shape", [(24, 24), (8, 40), (40, 8)])
def test_all_directions_of_a_matrix_get_about_the_same_size(shape: tuple[int, int]) -> None:
    """The iteration's fixed band is 0.68 to 1.13; products in bfloat16 add a few percent."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.logspace(-1, 0, min(shape))
    made = orthogonal(left @ torch.diag(values) @ right)
    assert made.shape == shape
    turned = left.T @ made @ right.T  # diagonal where directions are kept
    sizes = turned.diagonal()
    assert float(sizes.min()) > 0.6
    assert float(sizes.max()) < 1.25
    assert float((turned - torch.diag(sizes)).abs().max()) < 0.1


def test_what_is_no_matrix_learns_as_by_adamw() -> None:
    torch.manual_seed(1)
    ours = torch.randn(7, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    mine = MuonAdamW([{"params": [ours], "weight_decay": 0.1}], lr=0.03, betas=(0.9, 0.95))
    reference = torch.optim.AdamW([theirs], lr=0.03, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(20):
        gradient = torch.randn(7)
        for parameter, optimizer in ((ours, mine), (theirs, reference)):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_update_of_a_matrix_has_the_size_of_adamws() -> None:
    """Root mean square 0.2 times the rate, the band of the iteration aside; what decays is the weight itself."""
    torch.manual_seed(2)
    weight = torch.nn.Parameter(torch.zeros(32, 96))
    optimizer = MuonAdamW([{"params": [weight], "weight_decay": 0.0, "matrices": True}], lr=0.01, betas=(0.9, 0.95))
    weight.grad = torch.randn(32, 96)
    optimizer.step()
    size = float(weight.detach().square().mean().sqrt())
    assert 0.6 * 0.2 * 0.01 < size < 1.25 * 0.2 * 0.01
    assert float((weight.detach() * weight.grad).sum()) < 0.0


def test_a_matrix_that_nothing_pulls_at_stays() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 6))
    before = weight.detach().clone()
    optimizer = MuonAdamW([{"params": [weight], "weight_decay": 0.0, "matrices": True}], lr=0.01, betas=(0.9, 0.95))
    optimizer.step()  # no gradient at all
    weight.grad = torch.zeros(4, 6)
    optimizer.step()
    assert torch.equal(weight.detach(), before)


def test_stacked_matrices_are_each_made_orthogonal_alone() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 8, 20)
    torch.testing.assert_close(orthogonal(stack), torch.stack([orthogonal(matrix) for matrix in stack]))
    torch.testing.assert_close(orthogonal(stack.mT), orthogonal(stack).mT)

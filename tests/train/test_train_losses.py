"""Losses against values that are computed by hand."""

import math

import pytest
import torch

from seal_extract.genes.omics import PlanarFlow
from seal_extract.train.losses import (
    correlation_loss,
    expression_loss,
    flow_kl,
    info_nce,
    standardised_mse,
    to_parent,
)


def test_contrast_of_two_orthogonal_pairs():
    rows = torch.eye(2)
    # each row: one similarity of 1 / t, one of 0
    assert info_nce(rows, 3 * rows, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-6)


def test_contrast_of_rows_that_cannot_be_told_apart_is_log_b():
    assert info_nce(torch.ones(8, 3), torch.ones(8, 3)).item() == pytest.approx(math.log(8), abs=1e-5)


def test_contrast_is_symmetric_and_blind_to_length():
    a, b = torch.randn(6, 4), torch.randn(6, 4)
    assert info_nce(a, b).item() == pytest.approx(info_nce(b, a * 7).item(), rel=1e-5)


def test_contrast_by_its_definition():
    a, b, t = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64), 0.3
    total = 0.0
    for i in range(5):
        cos = [float(torch.cosine_similarity(a[i], b[j], dim=0)) / t for j in range(5)]
        soc = [float(torch.cosine_similarity(a[j], b[i], dim=0)) / t for j in range(5)]
        total += math.log(sum(map(math.exp, cos))) - cos[i] + math.log(sum(map(math.exp, soc))) - soc[i]
    assert info_nce(a, b, t).item() == pytest.approx(total / 10, rel=1e-5)


def test_correlation_of_one_two_and_minus_one():
    true = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [4.0, 4.0, 4.0]])
    predicted = true * torch.tensor([5.0, -1.0, 1.0]) + torch.tensor([3.0, 0.0, 0.0])
    # r = 1, -1, 1: 0.05 x (0 + 4 + 0)
    assert correlation_loss(predicted, true).item() == pytest.approx(0.2, abs=1e-4)


def test_a_gene_that_does_not_vary_counts_as_uncorrelated():
    assert correlation_loss(torch.randn(4, 1), torch.ones(4, 1)).item() == pytest.approx(0.05, abs=1e-3)


def test_standardised_error_by_hand():
    predicted, true = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 1.0]])
    assert standardised_mse(predicted, true, torch.tensor([2.0, 0.5])).item() == pytest.approx((1 + 4) / 2)


def test_expression_loss_is_a_tenth_of_correlation_and_five_errors():
    predicted, true, sd = torch.randn(6, 4), torch.randn(6, 4), torch.rand(4) + 0.5
    whole = 0.1 * (correlation_loss(predicted, true) + 5 * standardised_mse(predicted, true, sd))
    assert expression_loss(predicted, true, sd).item() == pytest.approx(whole.item())


def test_divergence_of_a_normal_from_itself_and_from_another():
    z = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(4000)
    zeros = torch.zeros_like(z)
    assert flow_kl(z, zeros, zeros, z, nothing).item() == pytest.approx(0, abs=1e-5)
    moved = z + 2  # N(2, 1) from N(0, 1): 2^2 / 2 for each dimension
    assert flow_kl(moved, zeros + 2, zeros, moved, nothing).item() == pytest.approx(6, rel=0.05)


def test_the_determinant_of_a_flow_is_that_of_its_jacobian():
    flow = PlanarFlow(4)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    z = torch.randn(3, 4)
    for row, log_det in zip(z, flow.log_det(z), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: flow(x[None])[0], row)
        assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=1e-5)


def test_a_patch_that_points_as_its_region_costs_nothing():
    regions = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    patches = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert to_parent(patches, regions, torch.tensor([0, 1, 1])).item() == pytest.approx(1 / 3)

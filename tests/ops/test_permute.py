"""Rows in another order: values, derivatives, vmap."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from mi_kernels.ops.permute import move

PLACES = torch.tensor([4, 0, 1, 6])
SOURCE = torch.tensor([1, 2, 4, 4, 0, 4, 3])


def by_index(rows):
    return rows.new_zeros(7, rows.shape[1]).index_copy(0, PLACES, rows)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32], ids=str)
def test_there_and_back(dtype):
    rows = torch.randn(4, 3).to(dtype)
    moved = move(rows, SOURCE, PLACES)
    assert torch.equal(moved, by_index(rows)) and torch.equal(move(moved, PLACES, SOURCE), rows)


@pytest.mark.parametrize("back", [False, True])
def test_derivatives(back):
    order = (PLACES, SOURCE) if back else (SOURCE, PLACES)
    rows = torch.randn(7 if back else 4, 3, dtype=torch.float64, requires_grad=True)
    function = lambda rows: move(rows, *order).sin()  # noqa: E731
    options = {"check_batched_grad": True}
    assert gradcheck(function, rows, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert gradgradcheck(function, rows, check_fwd_over_rev=True, check_rev_over_rev=True, **options)
    twice = torch.func.jacfwd(torch.func.jacfwd(function))(rows)
    torch.testing.assert_close(twice, torch.func.jacrev(torch.func.jacrev(function))(rows))


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap(dim):
    rows = torch.randn(4, 4, 4)
    expected = torch.stack([by_index(part) for part in rows.unbind(dim)])
    assert torch.equal(torch.func.vmap(lambda r: move(r, SOURCE, PLACES), dim)(rows), expected)
    both = torch.func.vmap(torch.func.vmap(lambda r: move(r, SOURCE, PLACES)))(rows.expand(2, 4, 4, 4))
    assert torch.equal(both[1], torch.stack([by_index(part) for part in rows]))

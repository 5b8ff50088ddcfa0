"""The published layers of published_weights.py are the products that they are said to be."""

import pytest
import torch
from published_weights import WEIGHTS, product

from mi_kernels.testing.errors import relative_error


@pytest.mark.parametrize("name", WEIGHTS)
def test_arguments_and_formula_agree(name):
    layer = WEIGHTS[name]
    tensors = layer.draw()
    arguments = layer.arguments(**tensors)
    y = layer.finish(product(**arguments), **tensors)
    expected = layer.formula(**tensors)
    assert y.shape == expected.shape and relative_error(y, expected) < 1e-12
    weight, published = arguments["weight"], {t.untyped_storage().data_ptr() for t in tensors.values()}
    assert "radial" in name or weight.untyped_storage().data_ptr() in published
    *lead, out, context, width = weight.shape
    assert (context, width) == (arguments["z"].shape[-1], arguments["x"].shape[-1])
    assert all(torch.equal(t, layer.draw()[key]) for key, t in tensors.items())

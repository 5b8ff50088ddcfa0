"""Drawn shapes: odd, prime, 1 and 0, any terms, any layout, values and gradients."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mi_kernels.testing.checks import check_gradients, check_values
from mi_kernels.testing.samples import LAYOUTS, Sample, Shape, term_subsets

FEATURES = st.one_of(st.sampled_from((0, 1, 2, 3, 16, 17, 31, 64, 67)), st.integers(0, 40))
ROWS = st.one_of(st.sampled_from((0, 1, 5, 16, 33, 97)), st.integers(0, 70))
# Pairs of leading dimensions that broadcast.
BATCHES = st.one_of(
    ROWS.map(lambda rows: ((rows,), (rows,))),
    st.sampled_from((((), ()), ((3,), ()), ((), (3,)), ((4, 1), (5,)), ((1, 2), (3, 1)), ((2, 0), (1,)))),
)


@st.composite
def drawn_samples(draw):
    x_batch, z_batch = draw(BATCHES)
    shape = Shape("drawn", x_batch, draw(FEATURES), draw(FEATURES), draw(FEATURES), context_batch=z_batch)
    # Expanded tensors repeat one number, and with few rows nothing else is left to compare.
    layout = draw(st.sampled_from([layout for layout in LAYOUTS if layout != "expanded"]))
    return Sample(shape, draw(st.sampled_from(term_subsets())), layout)


@pytest.mark.parametrize(
    "dtypes", [(torch.float64,), (torch.float32,), (torch.bfloat16, torch.float16)], ids=str
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_values_and_gradients(data, dtypes, place):
    sample, dtype = data.draw(drawn_samples()), data.draw(st.sampled_from(dtypes))
    check_values(sample, dtype, place.device)
    check_gradients(sample, dtype, place.device)

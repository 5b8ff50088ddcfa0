"""What generate, apply_generated and segment_ids say about arguments that do not fit."""

import pytest
import torch
from helpers import Spy

import mi_kernels as mi

ONES = {"x": (4, 5), "z": (4, 3), "weight": (2, 3, 5), "weight_z": (2, 3), "weight_x": (2, 5), "bias": (2,)}


@pytest.mark.parametrize(
    ("op", "changed", "error", "message"),
    [
        ("generate", {"z": [1.0]}, TypeError, "z: expected a torch.Tensor, got list"),
        ("generate", {"z": torch.tensor(1.0)}, ValueError, r"z: expected at least 1 dimension\(s\)"),
        (
            "generate",
            {"weight": torch.ones(2, 4, 5)},
            ValueError,
            r"weight: expected shape \[O, Z=3, X\], got",
        ),
        (
            "generate",
            {"weight_z": torch.ones(3, 3)},
            ValueError,
            r"weight_z: expected shape \[O=2, Z=3\], got",
        ),
        (
            "generate",
            {"weight_x": torch.ones(2, 4)},
            ValueError,
            r"weight_x: expected shape \[O=2, X=5\], got",
        ),
        ("generate", {"bias": torch.ones(3)}, ValueError, r"bias: expected shape \[O=2\], got \[3\]"),
        (
            "generate",
            {"bias": torch.ones(2).double()},
            TypeError,
            r"bias: expected torch.float32 \(the dtype of z",
        ),
        (
            "generate",
            {"weight": None, "weight_x": None},
            ValueError,
            "expected at least one of weight, weight_x, got None for both",
        ),
        ("apply_generated", {"x": None}, TypeError, "x: expected a torch.Tensor, got NoneType"),
        (
            "apply_generated",
            {"weight": torch.ones(5)},
            ValueError,
            r"weight: expected at least 2 dimension\(s\)",
        ),
        (
            "apply_generated",
            {"weight": torch.ones(4, 2, 6)},
            ValueError,
            r"weight: expected shape \[..., O, X=5\], got \[4, 2, 6\]",
        ),
        (
            "apply_generated",
            {"weight": torch.ones(3, 2, 5), "bias": None},
            ValueError,
            "weight: expected leading dimensions that broadcast with those of x",
        ),
        ("apply_generated", {"bias": torch.ones(4, 3)}, ValueError, "bias: expected a shape that broadcasts"),
        (
            "apply_generated",
            {"bias": torch.ones(7, 4, 2)},
            ValueError,
            "bias: expected a shape that broadcasts",
        ),
    ],
)
def test_messages(op, changed, error, message):
    arguments = {name: torch.ones(size) for name, size in ONES.items()}
    if op == "generate":
        del arguments["x"]
    else:
        arguments = {"x": torch.ones(4, 5), "weight": torch.ones(4, 2, 5), "bias": torch.ones(4, 2)}
    with Spy() as spy, pytest.raises(error, match=f"^{op}: {message}"):
        getattr(mi, op)(**arguments | changed)
    assert spy.names == []


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 1], TypeError, "segment_ids: expected a torch.Tensor, got list"),
        (torch.zeros(4), TypeError, "segment_ids: expected torch.int64, got torch.float32"),
        (torch.zeros(4).int(), TypeError, "segment_ids: expected torch.int64, got torch.int32"),
        (
            torch.zeros(4).long().to_sparse(),
            TypeError,
            r"segment_ids: expected a dense \(strided\) tensor, got torch.sparse_coo",
        ),
        (
            torch.nested.nested_tensor([torch.zeros(4).long()], layout=torch.jagged),
            TypeError,
            r"segment_ids: expected a dense \(strided\) tensor, got nested",
        ),
        (torch.zeros(3).long(), ValueError, r"segment_ids: expected shape \[N=4\], got \[3\]"),
        (torch.zeros(4, 1).long(), ValueError, r"segment_ids: expected shape \[N=4\], got \[4, 1\]"),
        (torch.zeros(4, device="meta").long(), ValueError, r"segment_ids: expected device cpu \(that of x\)"),
        (torch.tensor([0, 3, 1, 0]), ValueError, "segment_ids: expected numbers from 0 to G - 1 = 2, got 3"),
        (
            torch.tensor([0, -1, 1, 9]),
            ValueError,
            "segment_ids: expected numbers from 0 to G - 1 = 2, got -1",
        ),
    ],
)
def test_messages_about_segments(ids, error, message):
    x, z, weight = torch.ones(4, 5), torch.ones(3, 2), torch.ones(6, 2, 5)
    with pytest.raises(error, match=f"^interaction: {message}"):
        mi.interaction(x, z, weight, segment_ids=ids)
    with pytest.raises(error, match=f"^apply_generated: {message}"):
        mi.apply_generated(x, torch.ones(3, 6, 5), segment_ids=ids)


def test_messages_about_ragged_shapes():
    ids, weight = torch.zeros(4).long(), torch.ones(6, 2, 5)
    with pytest.raises(ValueError, match=r"^interaction: x: expected shape \[N, X\], got \[1, 4, 5\]"):
        mi.interaction(torch.ones(1, 4, 5), torch.ones(3, 2), weight, segment_ids=ids)
    with pytest.raises(ValueError, match=r"^interaction: z: expected shape \[G, Z\], got \[2\]"):
        mi.interaction(torch.ones(4, 5), torch.ones(2), weight, segment_ids=ids)
    with pytest.raises(ValueError, match=r"^apply_generated: weight: expected shape \[G, O, X\]"):
        mi.apply_generated(torch.ones(4, 5), torch.ones(6, 5), segment_ids=ids)


def test_numbers_of_no_groups():
    with pytest.raises(ValueError, match="^interaction: segment_ids: expected none, as G = 0, got 3"):
        mi.interaction(
            torch.ones(4, 5), torch.ones(0, 2), torch.ones(6, 2, 5), segment_ids=torch.full((4,), 3)
        )


def test_nested_tensors_are_told_what_to_do():
    """And what they are told to do is right."""
    parts = [torch.randn(length, 5) for length in (2, 0, 3)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    z, weight = torch.randn(3, 2), torch.randn(6, 2, 5)
    advice = r".* got nested; .* x.values\(\), .*=torch.repeat_interleave\(x.offsets\(\).diff\(\)\)$"
    with pytest.raises(TypeError, match=f"^interaction: x: {advice}"):
        mi.interaction(nested, z, weight)
    with pytest.raises(TypeError, match=f"^apply_generated: x: {advice}"):
        mi.apply_generated(nested, mi.generate(z, weight)[0])
    with pytest.raises(TypeError, match="^generate: z: .* got nested$"):
        mi.generate(nested, weight)
    ids = torch.repeat_interleave(nested.offsets().diff())
    expected = torch.cat([mi.interaction(part, one, weight) for part, one in zip(parts, z, strict=True)])
    torch.testing.assert_close(mi.interaction(nested.values(), z, weight, segment_ids=ids), expected)

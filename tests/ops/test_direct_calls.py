"""The registered operations themselves, past the public functions: every argument of each broken in turn.

Whatever comes, they answer rightly or raise an error that names the argument. `make sanitize` runs this file
under AddressSanitizer and UBSan.
"""

import itertools
import os
import re
from collections import Counter

import pytest
import torch
from emulated import backend as emulated
from helpers import plain
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import mi_kernels as mi
from mi_kernels import backends
from mi_kernels.explain import EXPLAINED
from mi_kernels.testing import direct

OPS = torch.ops.mi_kernels
PLAIN = [name for name in direct.operations() if plain(name) == name]
ON_TENSORS = [name for name in PLAIN if name + "_portable" in direct.operations()]
EMULATED = [*emulated.HOLDERS, *emulated.PLANS]
# What PyTorch refuses itself, in its own words: more memory than there is, numbers that are no dtype.
PYTORCHS = re.compile("overflow|allocate|too large|invalid size|ScalarType", re.IGNORECASE)


def names_one_of(message: str, names) -> bool:
    return any(re.search(rf"(: |'|of |, ){name}\b", message) for name in names)


def answer(operation, case: direct.Broken, names):
    """What the call returns, or None where it was refused in words that name the argument."""
    try:
        found = operation(*case.arguments)
    except (RuntimeError, ValueError, TypeError) as error:
        message = str(error)
        elsewhere = case.blamed is None and PYTORCHS.search(message)
        assert elsewhere or names_one_of(message, case.blamed or names), (
            f"{case.what}: {type(error)} {message}"
        )
        return None
    assert case.blamed is None, f"{case.what}: was taken, and gave {found}"
    return found


def has_kernel(name: str) -> bool:
    keys = ("CPU", "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(f"mi_kernels::{name}", key) for key in keys)


def cases(name: str):
    for arguments in direct.GOOD[name]():
        yield from direct.broken(name, arguments)


def argument_names(name: str) -> list[str]:
    return [argument.name for argument in direct.schema(name).arguments]


def test_every_operation_has_a_good_call():
    assert set(PLAIN) == set(direct.GOOD)


@pytest.mark.parametrize("name", PLAIN)
def test_good_calls(name):
    for arguments in direct.GOOD[name]():
        if has_kernel(name):
            assert getattr(OPS, name)(*arguments) is not None


@pytest.mark.parametrize("name", PLAIN)
def test_broken_arguments(name):
    """Of the compiled kernel, where there is one, and of the portable one; answers of both are the same."""
    if not has_kernel(name):
        pytest.skip("its library is not installed")
    names, counts = argument_names(name), Counter()
    for case in cases(name):
        found = answer(getattr(OPS, name), case, names)
        counts["answered" if found is not None else "refused"] += 1
        if name in ON_TENSORS:
            same = answer(getattr(OPS, name + "_portable"), case, names)
            if found is not None and same is not None:
                torch.testing.assert_close(found, same, equal_nan=True, msg=lambda m: f"{case.what}: {m}")  # noqa: B023
    if names:
        assert counts["refused"] > counts["answered"] / 10, counts


@pytest.mark.parametrize("name", ON_TENSORS)
def test_broken_arguments_of_triton(name):
    """What cannot be right is refused before a kernel is launched, or even compiled."""
    pytest.importorskip("triton")
    refused = [case for case in cases(name) if case.blamed is not None]
    assert len(refused) > 30
    for case in refused:
        assert answer(getattr(OPS, name + "_triton"), case, argument_names(name)) is None


@pytest.mark.parametrize("name", ON_TENSORS)
def test_broken_arguments_of_the_fake(name):
    """torch.compile sees what a call would say: the fake refuses what the kernel refuses."""
    names, compared = argument_names(name), 0
    for case in cases(name):
        tensors = [t for t in case.arguments if isinstance(t, torch.Tensor)]
        if any(t.layout is not torch.strided or t.device.type == "meta" for t in tensors):
            continue
        on_meta = tuple(t.to("meta") if isinstance(t, torch.Tensor) else t for t in case.arguments)
        real = answer(getattr(OPS, name + "_portable"), case, names)
        fake = answer(getattr(OPS, name), case._replace(arguments=on_meta), names)
        if real is None and case.blamed is None:
            continue  # for want of memory, perhaps
        assert (real is None) == (fake is None), case.what
        if real is not None:
            pairs = [(real, fake)] if isinstance(real, torch.Tensor) else zip(real, fake, strict=True)
            assert all(r.shape == f.shape and r.dtype == f.dtype for r, f in pairs), case.what
        compared += 1
    assert compared > 30


def test_fakes_take_sizes_that_nobody_knows():
    """Of data-dependent sizes the checks make assertions of the graph, and no guards."""
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        rows = env.create_unbacked_symint()
        x, z = torch.empty(rows, 5), torch.empty(rows, 3)
        y = OPS.interaction(x, z, torch.empty(2, 3, 5), None, None, torch.empty(2))
        assert y.shape[1] == 2
        arguments = torch.empty(1, 5), torch.empty(rows, 1), "tanh", 0.5
        assert OPS.modulate(x, *arguments).shape[1] == 5
        with pytest.raises(ValueError, match=r"interaction: weight: expected shape \[O, Z=3, X=5\]"):
            OPS.interaction(x, z, torch.empty(2, 3, 4), None, None, None)
    assert not env.guards


@pytest.mark.skipif(emulated.COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif("MI_KERNELS_CPU_LIBRARY" in os.environ, reason="it is compiled without sanitizers")
@pytest.mark.parametrize("name", EMULATED)
def test_broken_arguments_of_the_cuda_library(name):
    """Its checks and plans, on the host; no launch is emulated for what they refuse."""
    operation, names = getattr(emulated.load(), name), argument_names(name)
    for case in cases(name):
        layouts = {t.layout for t in case.arguments if isinstance(t, torch.Tensor)}
        if layouts <= {torch.strided} or name == "cuda_aligned":
            answer(operation, case, names)  # elsewhere there is no portable kernel to refuse other layouts


SIZES = (0, 1, 5, 300)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# W, U, V, c; dx, dz; how U and V lie.
TERMS = (1, 2, 4, 6, 8, 15, 16, 17, 32, 33, 48, 49, 54, 63, 48 + 6 + 64 + 256, 48 + 6 + 128 + 512, 1023)


@pytest.mark.skipif(backends.cpu_library_error() is not None, reason="no compiled library")
@pytest.mark.parametrize("primitive", ["forward", "input_grads", "weight_grads"])
def test_plans_of_all_sizes(primitive):
    """Plans are made for sizes of zero too, alone and together, and need no memory where nothing is made."""
    for sizes in itertools.product(SIZES, repeat=5):
        for terms, dtype in zip(TERMS, itertools.cycle(FLOATS), strict=False):
            text = OPS.cpu_interaction_plan(primitive, list(sizes), dtype, terms)
            scratch = int(re.search("scratch=([0-9]+)", text)[1])
            empty = sizes[0] == 0 or (sizes[4] if primitive != "input_grads" else sizes[1]) == 0
            assert scratch == 0 or not empty, (sizes, terms, text)


@pytest.mark.skipif(backends.cpu_library_error() is not None, reason="no compiled library")
def test_gate_plans_of_all_sizes():
    for sizes in itertools.product(SIZES, repeat=3):
        for terms, dtype, softmax in itertools.product((0, 1, 2, 7, 8, 30, 31), FLOATS, (False, True)):
            text = OPS.cpu_gate_plan(list(sizes), dtype, terms, softmax)
            assert text.endswith(";scratch=0") or sizes[0] * sizes[2] > 0, (sizes, terms, text)


@pytest.mark.skipif(emulated.COMPILER is None, reason="no C++ compiler")
@pytest.mark.skipif("MI_KERNELS_CPU_LIBRARY" in os.environ, reason="it is compiled without sanitizers")
@pytest.mark.parametrize("primitive", ["forward", "input_grads", "weight_grads"])
def test_cuda_plans_of_all_sizes(primitive):
    plan = emulated.load().cuda_interaction_plan
    for sizes in itertools.product(SIZES, repeat=5):
        for terms, dtype in zip((1, 6, 15, 16, 33, 48, 49, 63, 255), itertools.cycle(FLOATS), strict=False):
            assert plan(primitive, list(sizes), dtype, terms, 90, 132).startswith("algorithm=")


@pytest.mark.skipif(backends.cpu_library_error() is not None, reason="no compiled library")
def test_plans_of_the_largest_sizes():
    """Up to the bound nothing overflows; past it the sizes are named."""
    for place, other in itertools.permutations(range(5), 2):
        for least, accepted in ((2**26, True), (2**27, False)):
            sizes = [1] * 5
            sizes[place], sizes[other] = 2**27, least
            for primitive in ("forward", "input_grads", "weight_grads"):
                for terms in (63, 62):
                    if accepted:
                        OPS.cpu_interaction_plan(primitive, sizes, torch.float64, terms)
                    elif terms == 63:
                        with pytest.raises(RuntimeError, match="cpu_interaction_plan: sizes: expected"):
                            OPS.cpu_interaction_plan(primitive, sizes, torch.float64, terms)


# Axes of the tensors of each public function that has a plan, the required ones before "|".
EXPLAINED_AXES = {
    "interaction": "x:BX z:BZ | weight:OZX weight_z:OZ weight_x:OX bias:O",
    "bilinear": "input1:BZ input2:BX weight:OZX | bias:O",
    "generate": "z:BZ | weight:OZX weight_z:OZ weight_x:OX bias:O",
    "apply_generated": "x:BX weight:BOX | bias:BO",
    "apply_low_rank": "x:BX down:BZX up:BOZ | base:BO",
    "modulate": "x:BX scale:BX | shift:X",
    "mix": "a:BX b:X gate:BX |",
    "norm_modulate": "x:BX scale:BX | shift:X weight:X bias:X",
    "gated_residual": "x:BX h:BX | gate:X",
    "gated_residual_norm_modulate": "x:BX h:BX gate:X scale:BX shift:X | weight:X bias:X",
    "diagonal": "x:BX z:BZ weight:XZ | bias:X shift_weight:XZ shift_bias:X weight_x:XX",
    "gated_interaction": "x:BX z:BZ | weight:XZX weight_z:XZ weight_x:XX bias:X",
    "glu": "x:BX weight:OX weight_value:OX | bias:O bias_value:O",
    "low_rank": "x:BX z:BZ factor_x:OX factor_z:OZ | factor_out:OO weight_z:OZ weight_x:OX bias:O",
    "biaffine": "input1:BX input2:BZ weight:OXZ | bias:O",
    "multiplicative_rnn": "x:BZX weight_ih:OX weight_hh:OO | bias:O alpha:O beta_h:O beta_x:O",
}


def explained_calls(name: str, grads: bool, device: str):
    """Arguments with each size 0 or not and each optional tensor there or not."""
    required, optional = (part.split() for part in EXPLAINED_AXES[name].split("|"))
    for sizes in itertools.product((0, 3), repeat=4):
        size = dict(zip("BZXO", sizes, strict=True))
        for there in itertools.product((True, False), repeat=len(optional)):
            kept = required + list(itertools.compress(optional, there))
            shapes = {key: [size[axis] for axis in axes] for key, axes in (part.split(":") for part in kept)}
            made: dict = {"kind": "mi_rnn", "state": None} if name == "multiplicative_rnn" else {}
            made |= {key: torch.ones(s, device=device, requires_grad=grads) for key, s in shapes.items()}
            if optional and optional[0].startswith("weight:"):
                made.setdefault("weight", None)
                alone = ("weight", "weight_x") if name == "generate" else tuple(made)[len(required) :]
                if all(made.get(key) is None for key in alone):
                    continue
            yield made


def test_every_plan_is_tried():
    assert set(EXPLAINED_AXES) == set(EXPLAINED)


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("name", EXPLAINED)
def test_explain_of_zero_sizes(name, grads, place):
    """A plan that can be read, wherever the call itself has an answer."""
    tried = 0
    for arguments in explained_calls(name, grads, place.device):
        plan = mi.explain(name, **arguments)
        assert plan.operations >= 0 and str(plan)
        assert bool(plan.backward) == grads
        getattr(mi, name)(**arguments)
        tried += 1
    assert tried >= (32 if EXPLAINED_AXES[name][-1] != "|" else 16)  # without optional tensors

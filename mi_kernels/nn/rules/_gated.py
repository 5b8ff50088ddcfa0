"""Gated linear units of other packages: which of their parts may be read instead of called, and the call."""

from typing import Any

import torch
from torch import Tensor, nn

from ...functional import glu
from ...functional._call import call
from ...ops.activations import ActivationName
from ...ops.autocast import dtype_in_force
from ...ops.dtypes import FLOATING

# By exact class; what is not here, or has another formula, such as an approximation of tanh, is left.
ACTIVATIONS: dict[type[nn.Module], ActivationName] = {
    nn.Identity: "identity",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Mish: "mish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Hardswish: "hardswish",
}


def of_package(module: Any, names: dict[str, ActivationName]) -> None:
    """A package's own classes of activations, as far as its version has them."""
    ACTIVATIONS.update({getattr(module, name): act for name, act in names.items() if hasattr(module, name)})


def activation_of(act: Any) -> ActivationName | None:
    """The name of an activation, if it is one of ours and nothing else happens when it is called."""
    name = ACTIVATIONS.get(type(act))
    if name is None:
        if type(act) is nn.GELU:
            name = "gelu" if act.approximate == "none" else "gelu_tanh"
        elif type(act) is nn.Softplus and (act.beta, act.threshold) == (1, 20):
            name = "softplus"
        else:
            return None
    return name if is_called_only(act) else None


def is_called_only(part: nn.Module) -> bool:
    """Whether a call of it is its class's forward, without hooks."""
    own = vars(part)
    return "forward" not in own and not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )


def why_not_read(linear: Any) -> str | None:
    """Why a linear layer's parameters may not be read instead of calling it; None if they may."""
    if type(linear) is not nn.Linear:  # quantised, with an adapter, parametrized
        return f"a {type(linear).__name__} is where an nn.Linear was expected"
    if not is_called_only(linear):
        return "a linear layer of it has hooks or another forward"
    return why_not_tensors(linear.weight, linear.bias)


def why_not_tensors(*parameters: Any) -> str | None:
    """Why parameters of a layer may not be read; None if they may, or are None."""
    for tensor in parameters:
        if tensor is None:
            continue
        if type(tensor) not in (nn.Parameter, Tensor) and not _is_fake(tensor):
            return f"a parameter of it is a {type(tensor).__name__}, a subclass of tensors"
        if tensor.dtype not in FLOATING or tensor.layout is not torch.strided:
            return f"a parameter of it has the dtype {tensor.dtype} and the layout {tensor.layout}"
    return None


def _is_fake(tensor: Any) -> bool:
    return type(tensor).__name__ == "FakeTensor"


def why_not(act: Any, *linears: Any) -> str | None:
    """Why a gated linear unit of these parts is left; None if it can be one call."""
    if activation_of(act) is None:
        return f"its activation is none of mi.glu's, or has hooks ({type(act).__name__})"
    return next((reason for reason in map(why_not_read, linears) if reason is not None), None)


def gated(x: Any, act: Any, gate: Any, value: Any = None, *, gate_first: bool = True) -> Tensor | None:
    """act(gate(x)) * value(x) in one call; without ``value`` the layer ``gate`` has both halves.

    None where its parts have changed since the conversion, or dtypes differ: then they have to be called.
    """
    activation = activation_of(act)
    if activation is None or why_not_read(gate) is not None or not isinstance(x, Tensor):
        return None
    weight, bias = gate.weight, gate.bias
    tensors: tuple[Any, ...] = x, weight, bias
    weight_value = bias_value = None
    if value is not None:
        if why_not_read(value) is not None:
            return None
        weight_value, bias_value = value.weight, value.bias
        tensors = *tensors, weight_value, bias_value
    dtype = weight.dtype
    mixed = any(t is not None and t.dtype != dtype for t in tensors)
    if mixed and dtype_in_force(x.device.type) is None:
        return None
    # Rows [B, X] take the shortest way to the kernel.
    lead = x.shape[:-1] if x.dim() > 2 and x.is_contiguous() else None
    y = call(
        glu.glu,
        x if lead is None else x.flatten(0, -2),
        weight,
        bias,
        weight_value=weight_value,
        bias_value=bias_value,
        activation=activation,
        gate_first=gate_first,
    )
    return y if lead is None else y.view(*lead, y.shape[-1])

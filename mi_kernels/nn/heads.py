"""A generated layer on the parameters of the linear head that generates it in existing code."""

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize

from ..functional import heads
from ..functional.heads import Order, check_order
from ..ops.checks import check_shape, check_tensors
from ..ops.dtypes import FLOATING
from ._init import check_size
from .hyper import BiasPosition, HyperLinear

OP = "HyperLinear.from_linear"
POSITIONS = ("last", "first", None)
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class HyperLinearHead(HyperLinear):
    """What :meth:`mi_kernels.nn.HyperLinear.from_linear` returns: see there.

    Attributes:
        weight: the head's weight of shape ``[P, Z]``.
        bias: the head's bias of shape ``[P]``, or None.
        order, bias_position: how the head's output is laid out.
    """

    def __init__(
        self, head: nn.Linear, in_features: int, out_features: int, order: Order, bias: BiasPosition
    ) -> None:
        nn.Module.__init__(self)
        weight, own_bias = _parameters_of(head)
        check_size(OP, "in_features", in_features)
        check_size(OP, "out_features", out_features)
        check_order(OP, order)
        if bias is not None and (not isinstance(bias, str) or bias not in POSITIONS):
            known = ", ".join(map(repr, POSITIONS))
            raise ValueError(f"{OP}: bias: expected one of {known}, got {bias!r}")
        self.in_features, self.out_features = in_features, out_features
        self.context_features = weight.shape[1]
        self.order, self.bias_position = order, bias
        self.gain, self.context_network = 1.0, None
        size = out_features * (in_features + (bias is not None))
        rows = "O*X" if bias is None else "O*X+O"
        check_shape(OP, "head.weight", weight, {rows: size, "Z": None})
        check_shape(OP, "head.bias", own_bias, {rows: size})
        self.register_parameter("weight", weight)
        self.register_parameter("bias", own_bias)
        self.train(head.training)

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """W, U, V and c: views of the head's weight and bias, by :func:`mi_kernels.split_head`."""
        out, width = self.out_features, self.in_features
        matrix = (out, width) if self.order == "out,in" else (width, out)
        if self.bias_position is None:
            ((weight, weight_x),) = heads.split(self.weight, self.bias, [matrix], self.order)
            return weight, None, weight_x, None
        last = self.bias_position == "last"
        shapes = [matrix, (out,)] if last else [(out,), matrix]
        parts = heads.split(self.weight, self.bias, shapes, self.order)
        (weight, weight_x), (weight_z, bias) = parts if last else reversed(parts)
        return weight, weight_z, weight_x, bias

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"context_features={self.context_features}, order={self.order!r}, bias={self.bias_position!r}, "
            f"head_bias={self.bias is not None}"
        )


def _parameters_of(head: Any) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Weight and bias of a head that computes ``F.linear(z, weight, bias)`` of them, and nothing else."""
    if type(head) is not nn.Linear:
        kind = f"the class {head.__name__}" if isinstance(head, type) else type(head).__name__
        kind = f"{type(head).__module__}.Linear" if kind == "Linear" else kind  # of another package
        if isinstance(head, nn.Linear):
            parametrized = parametrize.is_parametrized(head)
            why = "a parametrization computes its weight" if parametrized else "it may compute something else"
            raise TypeError(f"{OP}: head: expected a torch.nn.Linear itself, got {kind}: {why}")
        advice = ": pass its last layer" if isinstance(head, nn.Sequential) else ""
        raise TypeError(f"{OP}: head: expected a torch.nn.Linear, got {kind}{advice}")
    if "forward" in vars(head):
        raise ValueError(f"{OP}: head: expected the forward of torch.nn.Linear, got another on the instance")
    hooks = [name.strip("_") for name in HOOKS if getattr(head, name)]
    if hooks:
        raise ValueError(
            f"{OP}: head: expected no hooks, as the layer would not run them, got {', '.join(hooks)}"
        )
    state = {*head._parameters, *head._buffers, *head._modules}
    if state != {"weight", "bias"}:
        raise ValueError(f"{OP}: head: expected weight and bias alone, got {', '.join(sorted(state))}")
    parameters = [head._parameters[name] for name in ("weight", "bias")]
    names = ("head.weight", "head.bias")
    check_tensors(OP, names, parameters, 1, FLOATING)
    for name, parameter in zip(names, parameters, strict=True):
        if parameter is not None and type(parameter) not in (nn.Parameter, FakeTensor):
            kind = type(parameter).__name__
            raise TypeError(f"{OP}: {name}: expected a torch.nn.Parameter, got {kind}, a subclass of tensors")
    weight, bias = parameters
    assert weight is not None
    check_shape(OP, "head.weight", weight, {"P": None, "Z": None})
    return weight, bias

"""Styles for ``torch.distributed.tensor.parallel.parallelize_module``."""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .axes import ModuleAxes
from .local import distribute_packed, is_packed, moved, packed_shard, to_global, to_local

Layouts = Placement | Sequence[Placement] | None


class _Style(ParallelStyle):
    """Shards the parameters of a module along one axis, and lays out its inputs and outputs for that."""

    def __init__(
        self,
        *,
        input_layouts: Layouts = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        given = (input_layouts,) if isinstance(input_layouts, Placement) else input_layouts
        for layout in (*(given or ()), output_layouts):
            if layout is not None and not isinstance(layout, Placement):
                raise TypeError(f"{name}: expected layouts that are placements, got {type(layout).__name__}")
        self.input_layouts = None if given is None else tuple(given)
        self.output_layouts = output_layouts
        self.use_local_output = use_local_output

    def _axis_of(self, module: nn.Module, axes: ModuleAxes) -> str:
        raise NotImplementedError

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        axes = self._axes_of(module)
        axis = self._axis_of(module, axes)
        sizes = _sizes(module, axes)
        for name, letters in axes.parameters.items():
            self._distribute(module, name, _placement(axes, name, letters, axis), device_mesh)
        for child in module.modules():
            child.register_load_state_dict_pre_hook(_distribute_whole)
            for name, parameter in list(child.named_parameters(recurse=False)):
                if not isinstance(parameter, DTensor):
                    self._distribute(child, name, Replicate(), device_mesh)
        if axes.packed:
            module.register_state_dict_post_hook(_check_packed)
        call = _Call(self, module, device_mesh, axes, axis, sizes)
        module.register_forward_pre_hook(call.inputs, with_kwargs=True)
        module.register_forward_hook(call.result)
        return module

    def _axes_of(self, module: nn.Module) -> ModuleAxes:
        style, kind = type(self).__name__, type(module).__name__
        declared = getattr(module, "_parallel_axes", None)
        if isinstance(module, nn.Linear):
            declared = functools.partial(_linear_axes, module)
        if declared is None:
            inside = [f"{name} ({type(child).__name__})" for name, child in module.named_children()]
            advice = f"; it has {', '.join(inside)}" if inside else ""
            raise NotImplementedError(
                f"{style}: expected a module of mi.nn with a sharded form or an nn.Linear, got {kind}{advice}"
            )
        axes: ModuleAxes = declared()
        for name, letters in axes.parameters.items():
            parameter: Any = module._parameters.get(name)
            if parameter is None or parameter.dim() != len(letters):
                expected = f"a {name} [{', '.join(letters)}] of its own in {kind}"
                raise NotImplementedError(f"{style}: expected {expected}")
            if isinstance(parameter, DTensor):
                raise ValueError(
                    f"{style}: {kind}: expected parameters that are not sharded yet, got a DTensor"
                )
        return axes

    def _distribute(self, module: nn.Module, name: str, placement: Placement, mesh: DeviceMesh) -> None:
        parameter = module._parameters[name]
        assert parameter is not None
        placed = _distributed(parameter.detach(), mesh, placement, self.src_data_rank)
        setattr(module, name, nn.Parameter(placed, parameter.requires_grad))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(input_layouts={self.input_layouts},"
            f" output_layouts={self.output_layouts}, use_local_output={self.use_local_output})"
        )


class Colwise(_Style):
    r"""Shards a module along its outputs: each device computes some features of y, of all of x and z.

    Of :class:`mi_kernels.nn.MultiplicativeInteraction` device p has the rows o of its part O_p of

    .. math:: y_o = \sum_{ij} z_i W_{oij} x_j + \sum_i U_{oi} z_i + \sum_j V_{oj} x_j + c_o, \quad o \in O_p

    so W, U, V and c are ``Shard(0)``, x and z ``Replicate()``, and y is ``Shard(-1)`` without communication;
    the gradients of x and z are sums over the devices (one all-reduce each, of those that are asked for).

    Args:
        input_layouts: placement of the first input of ``forward``, or of each of its tensors; ``Replicate()``
            by default. Plain tensors are taken to be parts of that.
        output_layouts: placement of the result, ``Shard(-1)`` by default (that of the features).
        use_local_output: whether the result is this device's part, a plain tensor, or a DTensor.

    For ``MultiplicativeInteraction``, ``Bilinear``, ``Biaffine``, ``HyperLinear``, the gates of a context,
    ``FiLM``, ``LowRankInteraction`` (its P, U, V and c), ``GLU`` and ``nn.Linear``.
    Sizes need not be divisible by the number of devices. Halves that are packed in one weight (``GLU``,
    ``FiLM``) are sharded each; the parameter is still one DTensor of the shape it had.

    Raises:
        NotImplementedError: there is no such form of the module.
        TypeError: a layout is no placement. ValueError: the module is sharded already, or there are more
            layouts than inputs.

    Source: Shoeybi et al., "Megatron-LM", 2019; ``torch.distributed.tensor.parallel.ColwiseParallel``.

    Example:
        >>> style = mi.parallel.Colwise()
        >>> # parallelize_module(model, mesh, {"mlp.glu": style, "mlp.down": mi.parallel.Rowwise()})
    """

    def _axis_of(self, module: nn.Module, axes: ModuleAxes) -> str:
        return axes.result


class Rowwise(_Style):
    r"""Shards a module along what it sums over: each device has a term of y, the sum of which is y.

    Of :class:`mi_kernels.nn.MultiplicativeInteraction`, with the inputs X sharded, device p has the term

    .. math:: y^{(p)}_o = \sum_i \sum_{j \in X_p} z_i W_{oij} x_j + \sum_{j \in X_p} V_{oj} x_j
        + \frac{1}{P} \Big(\sum_i U_{oi} z_i + c_o\Big)

    so x and W, V are sharded along X, z, U and c are ``Replicate()`` and counted once. y is one all-reduce
    (a reduce-scatter with ``output_layouts=Shard(0)``); the gradient of x needs none, that of z one.

    Args:
        axis: what is sharded: ``"X"`` (the features of x; of the first input of ``Bilinear`` and
            ``Biaffine``), ``"Z"`` (those of the context, of the second one) or ``"R"`` (the rank of
            ``LowRankInteraction``, whose x and z are whole). Default: that rank, of other modules ``"X"``.
        input_layouts: placement of the first input of ``forward``, or of each of its tensors. Default:
            ``Shard(-1)`` of the input that is sharded, ``Replicate()`` of others.
        output_layouts: placement of the result, ``Replicate()`` by default.
        use_local_output: whether the result is this device's part, a plain tensor, or a DTensor.

    For ``MultiplicativeInteraction``, ``Bilinear``, ``Biaffine`` (inputs without a one), ``HyperLinear``,
    ``LowRankInteraction`` and ``nn.Linear``. Modules with an activation of the sum have no such form: it
    would need the whole sum.

    Raises:
        NotImplementedError: there is no such form of the module.
        TypeError: a layout is no placement. ValueError: the axis is unknown, the module is sharded already,
            or there are more layouts than inputs.

    Source: as :class:`Colwise`; ``torch.distributed.tensor.parallel.RowwiseParallel``.

    Example:
        >>> style = mi.parallel.Rowwise(axis="Z")
        >>> # parallelize_module(model, mesh, {"interaction": style})
    """

    def __init__(
        self,
        *,
        axis: str | None = None,
        input_layouts: Layouts = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        if axis not in (None, "X", "Z", "R"):
            raise ValueError(f"Rowwise: axis: expected one of X, Z, R, got {axis!r}")
        super().__init__(
            input_layouts=input_layouts, output_layouts=output_layouts, use_local_output=use_local_output
        )
        self.asked = axis

    def _axis_of(self, module: nn.Module, axes: ModuleAxes) -> str:
        asked = self.asked or ("R" if "R" in axes.summed else "X")
        if asked not in axes.summed:
            known = ", ".join(axes.summed) or "none, as y is no sum over an axis"
            kind = type(module).__name__
            raise NotImplementedError(f"Rowwise: {kind}: expected an axis of {known}, got {asked!r}")
        return asked


class _Call:
    """The hooks of a module: its inputs as DTensors where they are needed, its result as it is asked for."""

    def __init__(
        self,
        style: _Style,
        module: nn.Module,
        mesh: DeviceMesh,
        axes: ModuleAxes,
        axis: str,
        sizes: dict[str, int],
    ) -> None:
        self.mesh, self.axes, self.sizes = mesh, axes, sizes
        self.use_local_output = style.use_local_output
        count = len(axes.inputs)
        self.names = list(inspect.signature(module.forward).parameters)[:count]
        pairs = list(zip(axes.inputs, axes.dims, strict=False))
        self.wanted = [Shard(dim) if own == axis else Replicate() for own, dim in pairs]
        is_summed = axis != axes.result
        layouts = self.wanted if is_summed else [Replicate()] * count
        if style.input_layouts is not None:
            if len(style.input_layouts) > count:
                name, kind = type(style).__name__, type(module).__name__
                raise ValueError(
                    f"{name}: {kind}: expected input_layouts for at most {count} inputs,"
                    f" got {len(style.input_layouts)}"
                )
            layouts = [*style.input_layouts, *layouts[len(style.input_layouts) :]]
        self.layouts = layouts
        self.output = style.output_layouts or (Replicate() if is_summed else Shard(axes.result_dim))

    def inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        placed = list(args)
        kwargs = dict(kwargs)
        for index, name in enumerate(self.names):
            if index < len(placed):
                placed[index] = self._input(index, placed[index])
            elif name in kwargs:
                kwargs[name] = self._input(index, kwargs[name])
        return tuple(placed), kwargs

    def _input(self, index: int, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if not isinstance(tensor, DTensor):
            layout = _positive(self.layouts[index], tensor.dim())
            shape = list(tensor.shape)
            if layout.is_shard():
                dim = layout.dim  # type: ignore[attr-defined]
                shape[dim] *= self.mesh.size()
                if dim == self.axes.dims[index] % tensor.dim():
                    shape[dim] = self.sizes.get(self.axes.inputs[index], shape[dim])
            tensor = to_global(tensor, self.mesh, torch.Size(shape), (layout,))
        return moved(tensor, (_positive(self.wanted[index], tensor.dim()),))

    def result(self, module: nn.Module, args: Any, output: Any) -> Any:
        placement = (_positive(self.output, output.dim()),)
        return to_local(output, placement) if self.use_local_output else moved(output, placement)


def fsdp_placement(parameter: nn.Parameter) -> Shard | None:
    """Where FSDP2 is to shard a parameter of a module that :class:`Colwise` has sharded already.

    Args:
        parameter: a parameter, as ``fully_shard(module, shard_placement_fn=...)`` passes it.

    Returns:
        ``Shard(1)`` for a weight whose two halves are sharded each (of ``GLU`` and ``FiLM``), None (FSDP2's
        own choice, dimension 0) for all others.

    Shards of such shards along dimension 0 would be parts of neither half: training would be right, but the
    whole tensor could not be put together again. A state dict of such a module raises.

    Raises:
        ValueError: the parameter is a packed bias, which has no other dimension.

    Example:
        >>> mi.parallel.fsdp_placement(torch.nn.Parameter(torch.randn(4, 3))) is None
        True
    """
    if not isinstance(parameter, DTensor) or not any(is_packed(one, 0) for one in parameter.placements):
        return None
    if parameter.dim() < 2:
        raise ValueError(
            "fsdp_placement: parameter: expected at least 2 dimensions, got a bias of two halves that are"
            " sharded each, which FSDP2 cannot shard once more: construct the module with bias=False, or"
            " leave it out of the plan of parallelize_module"
        )
    return Shard(1)


def _distributed(tensor: Tensor, mesh: DeviceMesh, placement: Placement, source: int | None) -> DTensor:
    if is_packed(placement, 0):
        return distribute_packed(tensor, mesh, placement, source)
    return distribute_tensor(tensor, mesh, [placement], src_data_rank=source)


def _distribute_whole(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    """Takes whole tensors, the same on all devices, from a state dict of one process."""
    parameters: dict[str, Any] = dict(module._parameters)
    for name, parameter in parameters.items():
        loaded = state_dict.get(prefix + name)
        if not isinstance(parameter, DTensor) or isinstance(loaded, DTensor) or loaded is None:
            continue
        if loaded.shape == parameter.shape and parameter.device_mesh.ndim == 1:
            loaded = loaded.to(parameter.device)
            placement = parameter.placements[0]
            state_dict[prefix + name] = _distributed(loaded, parameter.device_mesh, placement, None)


def _check_packed(module: nn.Module, state_dict: Any, prefix: str, _: Any) -> None:
    """Refuses a state dict with shards along dimension 0 of a packed parameter that is sharded there."""
    for name in module._parameters:
        parameter = state_dict.get(prefix + name)
        if isinstance(parameter, DTensor):
            shards = [one for one in parameter.placements if getattr(one, "dim", None) == 0]
            if len(shards) > 1:
                raise RuntimeError(
                    f"{type(module).__name__}: {name}: expected one mesh dimension that shards dimension 0 of"
                    f" packed halves, got {parameter.placements}: pass"
                    " shard_placement_fn=mi.parallel.fsdp_placement to fully_shard"
                )


def _linear_axes(module: nn.Module) -> ModuleAxes:
    parameters = {"weight": "OX"} | ({} if module._parameters.get("bias") is None else {"bias": "O"})
    return ModuleAxes(("X",), "O", parameters, "X")


def _positive(placement: Placement, rank: int) -> Placement:
    """A shard counted from the first dimension."""
    if placement.is_shard() and placement.dim < 0:  # type: ignore[attr-defined]
        return Shard(placement.dim + rank)  # type: ignore[attr-defined]
    return placement


def _sizes(module: nn.Module, axes: ModuleAxes) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, letters in axes.parameters.items():
        shape = list(module._parameters[name].shape)  # type: ignore[union-attr]
        if name in axes.packed:
            shape[0] //= 2
        sizes |= dict(zip(letters, shape, strict=True))
    return sizes


def _placement(axes: ModuleAxes, name: str, letters: str, axis: str) -> Placement:
    if axis not in letters:
        return Replicate()
    dim = letters.index(axis)
    return packed_shard(dim) if name in axes.packed and dim == 0 else Shard(dim)

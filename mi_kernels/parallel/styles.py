"""Styles for ``torch.distributed.tensor.parallel.parallelize_module``."""

import functools
import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.utils import parametrize

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
        several = isinstance(input_layouts, Sequence) and not isinstance(input_layouts, str)
        given = tuple(input_layouts) if several else (input_layouts,)  # type: ignore[arg-type]
        asked = {"input_layouts": () if input_layouts is None else given}
        asked["output_layouts"] = () if output_layouts is None else (output_layouts,)
        for argument, layouts in asked.items():
            for layout in layouts:
                if not isinstance(layout, Placement):
                    kind = type(layout).__name__
                    raise TypeError(f"{name}: {argument}: expected layouts that are placements, got {kind}")
        self.input_layouts = None if input_layouts is None else given
        self.output_layouts = output_layouts
        self.use_local_output = use_local_output

    @abstractmethod
    def _axis_of(self, module: nn.Module, axes: ModuleAxes) -> str:
        """What the style shards of a module."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        # All checks are before the first parameter is sharded: an error leaves the module as it was.
        if device_mesh.ndim != 1:
            style, kind = type(self).__name__, type(module).__name__
            raise ValueError(
                f"{style}: {kind}: device_mesh: expected a mesh of one dimension,"
                f' got {device_mesh.ndim} of them: pass one, as in mesh["tensor"]'
            )
        axes = self._axes_of(module)
        axis = self._axis_of(module, axes)
        call = _Call(self, module, device_mesh, axes, axis, _sizes(module, axes))
        for name, letters in axes.parameters.items():
            self._distribute(module, name, _placement(axes, name, letters, axis), device_mesh)
        for child in module.modules():
            child.register_load_state_dict_pre_hook(_distribute_whole)
            for name, parameter in list(child.named_parameters(recurse=False)):
                if not isinstance(parameter, DTensor):
                    self._distribute(child, name, Replicate(), device_mesh)
        if axes.packed:
            module.register_state_dict_post_hook(_check_packed)
        if not isinstance(module, nn.Linear):
            module.forward = _Uncompiled(module)  # type: ignore[method-assign, assignment]
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
                got = "a tensor that is no parameter" if parameter is None else f"{list(parameter.shape)}"
                axes_of = ", ".join(letters)
                raise NotImplementedError(
                    f"{style}: {kind}: {name}: expected a parameter [{axes_of}] of its own, got {got}"
                )
        for child_name, child in module.named_modules():
            # Also of the modules inside, whose parameters become DTensors, the same on all devices.
            computed = _computed(child)
            if computed:
                where = f"{child_name}.{computed}" if child_name else computed
                raise NotImplementedError(
                    f"{style}: {kind}: {where}: expected a parameter, got a tensor that others are made into:"
                    " remove the parametrization or pruning first"
                )
            for name, parameter in child.named_parameters(recurse=False):
                if isinstance(parameter, DTensor):
                    where = f"{child_name}.{name}" if child_name else name
                    raise ValueError(
                        f"{style}: {kind}: {where}: expected a parameter that is not sharded yet, got a"
                        " DTensor"
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
        NotImplementedError: there is no such form of the module, or a parametrization or pruning computes one
            of its parameters.
        TypeError: a layout is no placement. ValueError: the module is sharded already, the mesh has more than
            one dimension, there are more layouts than inputs; in a call: a tensor has no such dimension.

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
        NotImplementedError: there is no such form of the module, or a parametrization or pruning computes one
            of its parameters.
        TypeError: a layout is no placement. ValueError: the axis is unknown; otherwise as :class:`Colwise`.

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


class _Uncompiled:
    """The forward method of a module whose views of DTensors no graph of torch.compile can return."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @torch.compiler.disable(reason="mi_kernels runs modules with a style outside of the graph")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)


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
        self.label = f"{type(style).__name__}: {type(module).__name__}"
        self.use_local_output = style.use_local_output
        count = len(axes.inputs)
        self.names = list(inspect.signature(module.forward).parameters)[:count]
        pairs = list(zip(axes.inputs, axes.dims, strict=False))
        self.wanted = [Shard(dim) if own == axis else Replicate() for own, dim in pairs]
        is_summed = axis != axes.result
        layouts = self.wanted if is_summed else [Replicate()] * count
        if style.input_layouts is not None:
            if len(style.input_layouts) > count:
                raise ValueError(
                    f"{self.label}: input_layouts: expected layouts of at most {count} inputs,"
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
        name = self.names[index]
        if not isinstance(tensor, DTensor):
            layout = self._placed(name, self.layouts[index], tensor)
            shape = list(tensor.shape)
            if layout.is_shard():
                dim = layout.dim  # type: ignore[attr-defined]
                shape[dim] *= self.mesh.size()
                if dim == self.axes.dims[index] % tensor.dim():
                    shape[dim] = self.sizes.get(self.axes.inputs[index], shape[dim])
            tensor = to_global(tensor, self.mesh, torch.Size(shape), (layout,))
        elif tensor.device_mesh != self.mesh:
            got = tensor.device_mesh
            raise ValueError(f"{self.label}: {name}: expected a DTensor of {self.mesh}, got one of {got}")
        return moved(tensor, (self._placed(name, self.wanted[index], tensor),))

    def _placed(self, name: str, placement: Placement, tensor: Tensor) -> Placement:
        """A placement of a tensor, counted from its first dimension."""
        rank = tensor.dim()
        if placement.is_shard():
            dim: int = placement.dim  # type: ignore[attr-defined]
            if not -rank <= dim < rank:
                raise ValueError(
                    f"{self.label}: {name}: expected a layout along one of {rank} dimensions, got"
                    f" Shard({dim})"
                )
            return Shard(dim % rank) if dim < 0 else placement
        return placement

    def result(self, module: nn.Module, args: Any, output: Any) -> Any:
        placement = (self._placed("the result", self.output, output),)
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
    if isinstance(module, FSDPModule):
        module.reshard()  # what a forward pass has gathered is no parameter to load into
    parameters: dict[str, Any] = dict(module._parameters)
    for name, parameter in parameters.items():
        loaded = state_dict.get(prefix + name)
        if not isinstance(parameter, DTensor) or isinstance(loaded, DTensor) or loaded is None:
            continue
        if loaded.shape != parameter.shape:
            continue
        loaded = loaded.to(parameter.device)
        mesh, placements = parameter.device_mesh, parameter.placements
        if mesh.ndim == 1:
            state_dict[prefix + name] = _distributed(loaded, mesh, placements[0], None)
        else:
            kind = type(module).__name__
            state_dict[prefix + name] = _sharded_twice(f"{kind}: {name}", loaded, mesh, placements)


def _sharded_twice(label: str, whole: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> DTensor:
    """A tensor, the same on all devices, in the placements that FSDP2 has made of those of a style.

    The style's mesh is the last dimension, and cuts first; of its parts one dimension before it may cut once
    more. Its placement is strided where both cut along one dimension of the tensor.
    """
    *outer, own = placements
    last = len(outer)
    dim = getattr(own, "dim", None)
    cuts = [(number, one) for number, one in enumerate(outer) if not one.is_replicate()]
    strides = mesh.size(last) if cuts and dim == getattr(cuts[0][1], "dim", None) else 1
    is_known = all(
        isinstance(getattr(one, "dim", None), int) and getattr(one, "split_factor", 1) == strides
        for _, one in cuts
    )
    if len(cuts) > 1 or not is_known or (is_packed(own, 0) and strides > 1):
        raise NotImplementedError(
            f"{label}: expected placements of a style and of one dimension of FSDP2, got {tuple(placements)}:"
            " load the state dict before fully_shard"
        )
    tensor = whole.detach()
    if dim is not None:
        halves = tensor.chunk(2 if is_packed(own, 0) else 1, dim)
        tensor = torch.cat([_part(half, mesh, last, dim) for half in halves], dim)
    for number, one in cuts:
        tensor = _part(tensor, mesh, number, one.dim)  # type: ignore[attr-defined]
    return DTensor.from_local(
        tensor.contiguous(), mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _part(tensor: Tensor, mesh: DeviceMesh, number: int, dim: int) -> Tensor:
    """What a device has of a tensor that a dimension of the mesh shards, as PyTorch does."""
    parts, rank = tensor.chunk(mesh.size(number), dim), mesh.get_local_rank(number)
    return parts[rank] if rank < len(parts) else tensor.narrow(dim, 0, 0)


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


def _computed(module: nn.Module) -> str:
    """The name of a tensor that a parametrization, or a hook as of pruning, computes from parameters."""
    if parametrize.is_parametrized(module):
        return str(next(iter(module.parametrizations)))  # type: ignore[arg-type, call-overload]
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and {f"{name}_orig", f"{name}_g"} & module._parameters.keys():
            return name
    return ""


def _linear_axes(module: nn.Module) -> ModuleAxes:
    parameters = {"weight": "OX"} | ({} if module._parameters.get("bias") is None else {"bias": "O"})
    return ModuleAxes(("X",), "O", parameters, "X")


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

"""DTensor sharding rules of the registered operations: placements of results for placements of arguments.

They follow from what `define` is told of an operation: the axes of its tensors, the products that its results
are sums of, and the axes along which it may be cut (rules.py). Modulation is cut along any dimension,
normalisation along those before the channels. For all other placements DTensor redistributes first.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ..ops.imports import when_imported
from ..ops.library import DEFINED, Axes, Definition, Results, twins

Placements = list[Any]
Rule = Callable[[dict[str, Any]], list[tuple[Placements, Placements]]]


def _rule(definition: Definition) -> Rule:
    return _elementwise(definition.results) if definition.elementwise else _by_axes(definition)


def _inputs(arguments: dict[str, Any], placement: Callable[[str, Any], Any]) -> Placements:
    return [
        placement(name, value) if hasattr(value, "placements") else None for name, value in arguments.items()
    ]


def _by_axes(definition: Definition) -> Rule:
    from torch.distributed.tensor import Replicate

    from . import rules

    def rule(arguments: dict[str, Any]) -> list[tuple[Placements, Placements]]:
        given = {name: value for name, value in arguments.items() if hasattr(value, "placements")}
        axes = {name: letters for name, letters in definition.axes.items() if name in given}
        results, along = definition.results(arguments), definition.cuts(arguments)
        first = next(iter(axes))
        if definition.groups and given[first].ndim > len(axes[first]):
            axes = {name: "G" + letters for name, letters in axes.items()}
            results = [result and Axes("G" + result.letters, result.terms) for result in results]
            along += "G"
        cuts = [rules.whole(axes, results)]
        for letter in along:
            found = rules.cut(letter, axes, results, whole_results=True)
            if found is not None:
                cuts.append(found)
        whole = Replicate()  # what is no operand, such as an index
        return [
            (one.results, [one.arguments.get(name, whole) if name in given else None for name in arguments])
            for one in cuts
        ]

    return rule


def _elementwise(results: Results) -> Rule:
    from torch.distributed.tensor import Partial, Replicate, Shard

    def rule(arguments: dict[str, Any]) -> list[tuple[Placements, Placements]]:
        x, sizes = arguments.get("x", arguments.get("a")), results(arguments)  # of the size of y
        assert x is not None
        every: Placements = [Replicate()] * len(sizes)
        found = [(every, _inputs(arguments, lambda *_: Replicate()))]
        # What is normalised together, from ``dim`` on, is not cut.
        for dim in range(arguments.get("dim", x.ndim)):
            size = x.shape[dim]
            shift = arguments.get("shift_size", ())
            if size == 1 or (shift and arguments["want_shift"] and shift[dim] != 1):
                continue  # shift_size would have to be the size of the shard

            def placement(_: str, value: Any, dim: int = dim) -> Any:
                return Shard(dim) if value.shape[dim] != 1 else Replicate()

            def result(size: Sequence[int] | None, dim: int = dim) -> Any:
                if size is None:
                    return Replicate()
                return Shard(dim) if size[dim] != 1 else Partial()

            found.append(([result(size) for size in sizes], _inputs(arguments, placement)))
        return found

    return rule


def _named(rule: Rule, names: list[str]) -> Callable[..., Any]:
    # PyTorch leaves out the last arguments where they have their default.
    return lambda *values: rule(dict(zip(names, values, strict=False)))


def _register() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator
    for name, definition in DEFINED.items():
        rule = _rule(definition)
        for operation in twins(name):
            arguments = operation._schema.arguments
            names = [argument.name for argument in arguments]
            register_sharding(operation)(_named(rule, names))
            # By default its cache ignores all but tensors and integers; here flags and names matter, too.
            tensors = [index for index, argument in enumerate(arguments) if "Tensor" in str(argument.type)]
            info = RuntimeSchemaInfo(max(tensors) + 1, needs_pytree=True)
            propagator.register_op_strategy(operation, propagator.op_strategy_funcs[operation], info)


def register() -> None:
    when_imported("torch.distributed.tensor", _register)

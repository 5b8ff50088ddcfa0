"""DTensor sharding rules of the operations: placements of results for placements of arguments.

Supported: everything replicated; rows sharded and weights replicated, so that gradients of weights are
partial sums; groups of rows sharded with their weights. Modulation is sharded along any dimension,
normalisation along those before the channels; recurrences are replicated. For all other placements DTensor
redistributes first.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ..ops.imports import when_imported
from ..ops.library import DEFINED, Definition, Results, twins

Placements = list[Any]
Rule = Callable[..., list[tuple[Placements, Placements]]]
ROWS = ("grad", "x", "z", "p", "q")


def _rule(definition: Definition) -> Rule:
    if definition.elementwise:
        return _elementwise(definition.results)
    return _by_rows(definition.results, not definition.composed)


def _inputs(arguments: dict[str, Any], placement: Callable[[str, Any], Any]) -> Placements:
    return [
        placement(name, value) if hasattr(value, "placements") else None for name, value in arguments.items()
    ]


def _by_rows(results: Results, local: bool) -> Rule:
    """``local``: rows depend on no numbers of other rows."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    def rule(arguments: dict[str, Any]) -> list[tuple[Placements, Placements]]:
        kinds = results(arguments)
        every: Placements = [Replicate()] * len(kinds)
        found = [(every, _inputs(arguments, lambda *_: Replicate()))]
        if not local or all(kind == "nothing" for kind in kinds):
            return found
        x = next(value for name, value in arguments.items() if name in ROWS)
        rows = Shard(x.ndim - 2)
        placed: dict[str, Any] = {"rows": rows, "weight": Partial(), "nothing": Replicate()}
        shards = _inputs(arguments, lambda name, _: rows if name in ROWS else Replicate())
        found.append(([placed[kind] for kind in kinds], shards))
        if x.ndim == 3:
            groups: Placements = [Replicate() if kind == "nothing" else Shard(0) for kind in kinds]
            found.append((groups, _inputs(arguments, lambda *_: Shard(0))))
        return found

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

"""How the operations run on DTensors: which placements of arguments give which placements of results.

All replicated; rows sharded, weights replicated, so that gradients of weights are partial sums; groups of
rows with their weights sharded. Modulation is sharded along any dimension. For everything else DTensor moves
data first.
"""

from collections.abc import Callable, Sequence
from typing import Any

from mi_kernels.ops.imports import when_imported
from mi_kernels.ops.library import overloads

Placements = list[Any]
Rule = Callable[..., list[tuple[Placements, Placements]]]
ROWS = ("grad", "x", "z")


def _rules() -> dict[str, Rule]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    def inputs(arguments: dict[str, Any], placement: Callable[[str, Any], Any]) -> Placements:
        return [
            placement(name, value) if hasattr(value, "placements") else None
            for name, value in arguments.items()
        ]

    def by_rows(results: Callable[[dict[str, Any]], Sequence[str]]) -> Rule:
        """``results``: of each result "rows", "weight" or "nothing"."""

        def rule(arguments: dict[str, Any]) -> list[tuple[Placements, Placements]]:
            x, kinds = arguments["x"], results(arguments)
            every: Placements = [Replicate()] * len(kinds)
            found = [(every, inputs(arguments, lambda *_: Replicate()))]
            rows = Shard(x.ndim - 2)
            placed: dict[str, Any] = {"rows": rows, "weight": Partial(), "nothing": Replicate()}
            shards = inputs(arguments, lambda name, _: rows if name in ROWS else Replicate())
            found.append(([placed[kind] for kind in kinds], shards))
            if x.ndim == 3:
                groups: Placements = [Replicate() if kind == "nothing" else Shard(0) for kind in kinds]
                found.append((groups, inputs(arguments, lambda *_: Shard(0))))
            return found

        return rule

    def wanted(kind: str, *flags: str) -> Callable[[dict[str, Any]], list[str]]:
        return lambda arguments: [kind if arguments[flag] else "nothing" for flag in flags]

    def modulation(results: Callable[[dict[str, Any]], Sequence[Sequence[int] | None]]) -> Rule:
        """``results``: the sizes of each result, None where it is not wanted."""

        def rule(arguments: dict[str, Any]) -> list[tuple[Placements, Placements]]:
            x, sizes = arguments["x"], results(arguments)
            every: Placements = [Replicate()] * len(sizes)
            found = [(every, inputs(arguments, lambda *_: Replicate()))]
            for dim in range(x.ndim):
                size = x.shape[dim]
                shift = arguments.get("shift_size", ())
                if size == 1 or (shift and arguments["want_shift"] and shift[dim] != 1):
                    continue  # a size among the arguments would have to be that of the shard

                def placement(_: str, value: Any, dim: int = dim) -> Any:
                    return Shard(dim) if value.shape[dim] != 1 else Replicate()

                def result(size: Sequence[int] | None, dim: int = dim) -> Any:
                    if size is None:
                        return Replicate()
                    return Shard(dim) if size[dim] != 1 else Partial()

                found.append(([result(size) for size in sizes], inputs(arguments, placement)))
            return found

        return rule

    def gradients_of_modulation(arguments: dict[str, Any]) -> list[Sequence[int] | None]:
        sizes = arguments["x"].shape, arguments["scale"].shape, arguments["shift_size"]
        flags = arguments["want_x"], arguments["want_scale"], arguments["want_shift"]
        return [size if flag else None for size, flag in zip(sizes, flags, strict=True)]

    def gate(arguments: dict[str, Any]) -> list[str]:
        return ["rows", "rows" if arguments["keep_gate"] else "nothing"]

    weights = "want_weight", "want_weight_z", "want_weight_x", "want_bias"
    return {
        "interaction": by_rows(lambda _: ["rows"]),
        "interaction_packed": by_rows(lambda _: ["rows"]),
        "interaction_input_grads": by_rows(wanted("rows", "want_x", "want_z")),
        "interaction_weight_grads": by_rows(wanted("weight", *weights)),
        "diagonal": by_rows(gate),
        "gated_interaction": by_rows(gate),
        "modulate": modulation(lambda arguments: [arguments["x"].shape]),
        "modulate_grads": modulation(gradients_of_modulation),
    }


def _named(rule: Rule, names: list[str]) -> Callable[..., Any]:
    return lambda *values: rule(dict(zip(names, values, strict=True)))


def _register() -> None:
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    propagator = DTensor._op_dispatcher.sharding_propagator
    for name, rule in _rules().items():
        for operation in set(overloads(name).values()):
            arguments = operation._schema.arguments
            names = [argument.name for argument in arguments]
            register_sharding(operation)(_named(rule, names))
            # It tells cached results apart by tensors and integers alone. Here flags count, and names.
            tensors = [index for index, argument in enumerate(arguments) if "Tensor" in str(argument.type)]
            info = RuntimeSchemaInfo(max(tensors) + 1, needs_pytree=True)
            propagator.register_op_strategy(operation, propagator.op_strategy_funcs[operation], info)


when_imported("torch.distributed.tensor", _register)

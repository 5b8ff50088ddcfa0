"""What a call of a module would compute with, for what is made of its parameters without a call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# Not the global ones, which run on what is made as they do on the module.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def as_called(
    where: str, module: nn.Module, owner: type[nn.Module], method: str = "forward"
) -> Iterator[None]:
    """Within it, pruned parameters are those of the next call; refused is what else a call would do.

    ``owner`` is the class whose forward is known, and ``method`` that of its methods which asks: a subclass
    that has both of its own knows what it does.
    """
    kind: Any = type(module)
    replaced = kind.forward is not owner.forward or kind.__call__ is not nn.Module.__call__
    if replaced and getattr(kind, method) is getattr(owner, method):
        raise TypeError(
            f"{where}: expected the forward of {owner.__name__}, got that of {kind.__name__}: it needs a"
            f" {method} of its own, too"
        )
    if "forward" in vars(module):
        raise TypeError(
            f"{where}: expected the forward of {owner.__name__}, got another on the instance:"
            f" take it off first"
        )
    masks, others = _hooks(module)
    if others:
        raise TypeError(
            f"{where}: expected no hooks but those of torch.nn.utils.prune, as what is returned would not run"
            f" them, got {', '.join(others)}: remove them first (torch.nn.utils.parametrizations need none)"
        )
    attributes = vars(module)
    before = {name: attributes[name] for name in masks if name in attributes}
    attributes.update({name: mask(module) for name, mask in masks.items()})
    try:
        yield
    finally:
        # They may belong to a graph that is still in use.
        for name in masks:
            attributes.pop(name)
        attributes.update(before)


def _hooks(module: nn.Module) -> tuple[dict[str, Callable[[nn.Module], Tensor]], list[str]]:
    """Names of pruned parameters with the functions that compute them, and the names of all other hooks."""
    hooks: list[Any] = [hook for kind in HOOKS for hook in getattr(module, kind).values()]
    if not hooks:
        return {}, []
    from torch.nn.utils.prune import BasePruningMethod  # torch itself does not import it

    masks, others = {}, []
    for hook in hooks:
        if isinstance(hook, BasePruningMethod) and type(hook).__call__ is BasePruningMethod.__call__:
            masks[hook._tensor_name] = hook.apply_mask
        else:
            others.append(getattr(hook, "__name__", type(hook).__name__))
    return masks, others

"""The one place where schemas meet the dispatcher.

Every operation is defined here, in Python, so that the package imports without a compiler; the
compiled libraries only add kernels for their dispatch keys. Each schema is defined twice: under its
own name, where a compiled kernel may take over, and as ``<name>_portable``, which is always the
pure-PyTorch implementation, whatever is installed.
"""

from collections.abc import Callable

import torch

NAMESPACE = "mi_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, schema: str, portable: Callable, fake: Callable) -> None:
    """Define ``name`` and ``name_portable`` with one schema, one fake and one portable kernel."""

    # A call that mixes meta and real tensors comes here too, and would get uninitialised memory back.
    def checked_fake(*arguments):
        devices = {argument.device for argument in arguments if isinstance(argument, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{name}: expected all tensors on one device, got {sorted(map(str, devices))}")
        return fake(*arguments)

    # The caller has cast already; autocast must not cast the kernel's own float32 intermediates again.
    def kernel(*arguments):
        device = arguments[0].device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return portable(*arguments)
        with torch.autocast(device, enabled=False):
            return portable(*arguments)

    for op in (name, f"{name}_portable"):
        LIBRARY.define(op + schema)
        LIBRARY.impl(op, kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{op}", checked_fake, lib=LIBRARY)


def overload(name: str, portable: bool) -> torch._ops.OpOverload:
    """The dispatcher entry of ``name``, compiled where possible or always portable."""
    packet = getattr(torch.ops.mi_kernels, f"{name}_portable" if portable else name)
    return packet.default


# Questions to the compiled CPU library: its instruction sets as "compiled;supported;selected", and the plan
# of a primitive for sizes [G, B, Z, X, O], or of a gate for sizes [B, Z, X], as "name=value;...".
LIBRARY.define("cpu_isa() -> str")
LIBRARY.define("cpu_gate_plan(int[] sizes, ScalarType dtype, int terms, bool softmax) -> str")
LIBRARY.define("cpu_interaction_plan(str primitive, int[] sizes, ScalarType dtype, int terms) -> str")

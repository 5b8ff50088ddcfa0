"""What a process without Python needs to run a saved program: the compiled operations' schemas, as C++."""

import torch

from .ops.namespace import NAMESPACE

_HEAD = f"""// Written by `python -m mi_kernels schemas`: compile it into the program that runs packages of
// AOTInductor, and load libmi_kernels_cpu.so there (dlopen) before the first package. In Python, mi_kernels
// defines these itself.
#include <torch/library.h>

TORCH_LIBRARY({NAMESPACE}, m) {{
"""


def as_cpp() -> str:
    """A translation unit that defines the operations for which a compiled library has kernels.

    Those that exist in Python alone are left out: the twins of other backends, and the functions that
    derivatives are registered for, which compiled programs do not call.
    """
    prefix = f"{NAMESPACE}::"
    known = (str(schema) for schema in torch._C._jit_get_all_schemas() if schema.name.startswith(prefix))
    lines = sorted(line.removeprefix(prefix) for line in known if _is_compiled(line.partition("(")[0]))
    return _HEAD + "".join(f'  m.def("{line}");\n' for line in lines) + "}\n"


def _is_compiled(name: str) -> bool:
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in ("CPU", "CUDA"))

"""The CUDA kernels on the host: `install` makes them the backend "cuda" of tensors on the CPU.

Only the launches (launches.cpp) and the instructions (emulator.h) are replaced: the checks, plans, index
arithmetic, pipelines and epilogues are those that a GPU runs.
"""

import fcntl
import hashlib
import shutil
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mi_kernels import planners
from mi_kernels.ops.backend import get, register
from mi_kernels.ops.dual_linear import autograd as dual
from mi_kernels.ops.gate import autograd as gates
from mi_kernels.ops.interaction import autograd as interaction
from mi_kernels.ops.interaction import by_segment
from mi_kernels.ops.modulate import autograd as modulate
from mi_kernels.ops.norm import terms as norm

ROOT = Path(__file__).parents[2]
NAMESPACE = "mi_kernels_emulated"
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
# The tables that hold the implementations of each operation by backend.
HOLDERS = {
    "interaction": interaction._FORWARD.plain,
    "interaction_input_grads": interaction._INPUT_GRADS.plain,
    "interaction_weight_grads": interaction._WEIGHT_GRADS.plain,
    "diagonal": gates._DIAGONAL,
    "gated_interaction": gates._GATED,
    "dual_linear": dual._DUAL_LINEAR,
    "dual_linear_grads": dual._GRADS,
    "modulate": modulate._MODULATE,
    "modulate_grads": modulate._MODULATE_GRADS,
    "mix": modulate._MIX,
    "mix_grads": modulate._MIX_GRADS,
    "norm_modulate": norm._NORM_MODULATE,
    "norm_modulate_grads": norm._GRADS,
}
# Those that call the plain primitives for each group.
BY_SEGMENT = (
    (interaction._FORWARD, by_segment.forward),
    (interaction._INPUT_GRADS, by_segment.input_grads),
    (interaction._WEIGHT_GRADS, by_segment.weight_grads),
)
PLANS = ("cuda_interaction_plan", "cuda_gate_plan", "cuda_aligned")
# Operations of the emulated library alone: the bank conflicts, and the copies of W, since the previous call;
# sets the number of multiprocessors and returns the one before; W in contiguous groups, by its kernel.
QUESTIONS = (
    "emulated_conflicts() -> int",
    "emulated_processors(int count) -> int",
    "emulated_repacks() -> int",
    "emulated_repack(Tensor weight, bool grouped) -> Tensor",
    "cuda_architectures() -> str",
    "tf32_allowed() -> bool",
)
_library: list[torch.library.Library] = []


def build() -> Path:
    """The compiled library; compiled again only when a source has changed."""
    sources = [*sorted((ROOT / "csrc/cuda").rglob("*.cpp")), ROOT / "tests/emulated/launches.cpp"]
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(path for part in ("csrc", "tests/emulated") for path in (ROOT / part).rglob("*.*")):
        if path.suffix in (".h", ".cuh", ".cpp"):
            digest.update(path.read_bytes())
    directory = ROOT / "build" / "emulated"
    directory.mkdir(parents=True, exist_ok=True)
    library = directory / f"{digest.hexdigest()[:16]}.so"
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for old in directory.glob("*.so"):
                old.unlink()
            _compile(sources, directory, library)
    return library


def _compile(sources: list[Path], directory: Path, library: Path) -> None:
    torch_directory = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
    flags += ["-I", str(ROOT / "csrc"), "-isystem", str(torch_directory / "include")]
    flags += [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DMI_DISPATCH_KEY=CPU",
        f"-DMI_NAMESPACE={NAMESPACE}",
        '-DMI_CUDA_ARCHITECTURES="80 90a"',
    ]
    objects = [directory / f"{source.stem}.o" for source in sources]
    compilers = [
        subprocess.Popen([COMPILER, *flags, "-c", source, "-o", to], stderr=subprocess.PIPE, text=True)
        for source, to in zip(sources, objects, strict=True)
    ]
    messages = [compiler.communicate()[1] for compiler in compilers]
    failed = [m for m, compiler in zip(messages, compilers, strict=True) if compiler.returncode]
    assert not failed, "\n".join(failed)
    link = [COMPILER, "-shared", *objects, "-o", library, "-L", torch_directory / "lib", "-ltorch_cpu"]
    subprocess.run([*link, "-Wl,-z,defs"], check=True)


def load():
    """The emulated operations, a namespace of torch.ops."""
    if not _library:
        _library.append(torch.library.Library(NAMESPACE, "DEF"))
        for name in (*HOLDERS, *PLANS):
            schema = str(getattr(torch.ops.mi_kernels, name).default._schema)
            _library[0].define(schema.removeprefix("mi_kernels::"))
            known = torch._library.simple_registry.singleton.find(f"mi_kernels::{name}").fake_impl.kernel
            if known is not None:
                torch.library.register_fake(f"{NAMESPACE}::{name}", known.func, lib=_library[0])
        for question in QUESTIONS:
            _library[0].define(question)
        _library[0].impl("tf32_allowed", torch.ops.mi_kernels.tf32_allowed, "CompositeExplicitAutograd")
        torch.ops.load_library(str(build()))
    return getattr(torch.ops, NAMESPACE)


def install() -> None:
    """Make them the backend "cuda" of tensors on the CPU, for the rest of this process."""
    operations = load()
    for name, holder in HOLDERS.items():
        holder["cuda"] = getattr(operations, name).default
    planners.query = partial(getattr, operations)
    planners.gpu = lambda device: (80, 4)
    for holder, kernel in BY_SEGMENT:
        holder.by_segment["cuda"] = kernel("", NAMESPACE)
    register(replace(get("cuda"), why_not=lambda: None, devices=lambda: ("cpu",)))

"""Every kind of Triton kernel compiles for GPUs that are not here; the search for the wgmma hazard finds it.

The whole (all sizes, activations, capabilities and dtypes) is one command: python tools/aot.py
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mi_kernels import backends

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import results
from tools import aot, cold_start, sass

pytestmark = pytest.mark.tools

WHY_NOT = aot.why_not() or ("the kernels are made for the interpreter" if backends.interpreting() else None)
needs_tools = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))


@needs_tools
@pytest.mark.parametrize(("capability", "dtype"), [(80, "float16"), (90, "bfloat16"), (100, "tf32")])
def test_compiled_ahead_of_time(capability, dtype, tmp_path):
    """In a process of its own: nothing that another test compiled, and nothing of Triton's cache, counts."""
    command = [
        sys.executable,
        "tools/aot.py",
        "--short",
        "--capability",
        str(capability),
        "--dtype",
        dtype,
    ]
    environment = {
        "PYTHONPATH": str(aot.environment.ROOT),
        "TRITON_CACHE_DIR": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [*command, "--jobs", "1"], cwd=aot.environment.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    name = {90: "wgmma", 100: "tcgen05"}.get(capability, "mma")
    assert f"| {capability} | {dtype} |" in done.stdout and name in done.stdout


def kernels_of(batch):
    from tools import variants

    return variants.first_calls((9, 0), torch.bfloat16, (batch, 32, 256, 256))


def test_which_batch_sizes_are_compiled_for():
    """With the same tiles: multiples of 16, and others; of modulation, norms and RNNs all are one."""
    pytest.importorskip("triton")
    even, odd = kernels_of(5008), kernels_of(5001)
    counts = {"interaction": 8, "diagonal": 5, "gated_interaction": 9, "dual_linear": 5, "modulate": 2}
    counts |= {"norm": 2, "recurrent": 5}
    assert {name: len(kernels) for name, kernels in even.items()} == counts
    assert all(odd[name].keys() == even[name].keys() for name in ("modulate", "norm", "recurrent"))
    for known, batches in ((even, (5024, 8000)), (odd, (5003, 7777, 7999))):
        for batch in batches:
            for name, kernels in kernels_of(batch).items():
                assert kernels.keys() == known[name].keys(), (batch, name)


def test_the_number_of_parts_is_not_compiled_for():
    pytest.importorskip("triton")
    from mi_kernels.ops.triton import interaction, plan
    from mi_kernels.ops.triton.launch import recording
    from tools import variants

    keys, parts = [], []
    for rows in (112, 1040):
        x, z, w = plan.without_data((rows, 256), (rows, 32), (256, 32, 256), dtype=torch.bfloat16)
        with recording((9, 0)) as launches:
            interaction.forward(x, z, w, None, None, None)
        keys.append(variants.distinct(launches, (9, 0)).keys())
        parts.append(launches[0].arguments["splits"])
    assert parts[0] % 16 == 0 < parts[1] % 16 and parts[1] > 1
    assert keys[0] == keys[1]


def test_cold_start(monkeypatch, tmp_path, capsys):
    """Without the imports and the compilation, which take a minute."""
    pytest.importorskip("triton")
    monkeypatch.setattr(aot, "why_not", lambda: None)
    monkeypatch.setattr(aot, "compiled_anew", lambda launch, capability: (None, 0.5))
    monkeypatch.setattr(cold_start, "seconds_of", lambda before, statement: 2.0)
    path = tmp_path / "result.json"
    assert cold_start.main(["--output", str(path), "--rounds", "2"]) == 0
    found = results.read(path)
    assert found["imports"]["torch"] == [2.0, 2.0]
    assert found["compilations"]["modulate"]["kernels"] == ["_modulate_kernel", "_modulate_grads_kernel"]
    assert found["compilations"]["modulate"]["seconds"] == [1.0, 1.0]
    assert "| modulate | 2 | 1.00 |" in capsys.readouterr().out


def test_seconds_of_a_statement():
    assert 0.1 <= cold_start.seconds_of("import time", "time.sleep(0.1)") < 5


def test_expected_instructions():
    product, none = {"w": "an operand"}, {"w": None}
    for capability, large in ((80, "mma"), (89, "mma"), (90, "wgmma"), (100, "tcgen05"), (120, "mma")):
        assert aot.expected({"BM": 128}, product, capability, "bfloat16") == large
        assert aot.expected({"BM": 16}, product, capability, "bfloat16") == "mma"
        float64 = None if capability in (89, 120) else "mma"
        assert aot.expected({"BM": 128}, product, capability, "float64") == float64
    assert aot.expected({"BM": 128}, none, 90, "bfloat16") is None
    assert aot.expected({"BM": 128}, product, 90, "float32") is None


def test_tools_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(sass, "disassembler", lambda name: None)
    assert aot.why_not() == "cuobjdump: not found on PATH nor in the package triton"


LOOP = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0100*/                   HMUL2.BF16_V2 R24, R4, R5 ;
        /*0110*/                   HGMMA.64x128x16.F32.BF16 R56, R24, gdesc[UR4], R56, gsb0 ;
        /*0120*/                   {first} ;
        /*0130*/                   {second} ;
        /*0140*/               @P0 BRA 0x100 ;
"""
WAIT, WRITE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "HMUL2.BF16_V2 R26, R4, R5"


@pytest.mark.parametrize(
    ("first", "second", "hazards"), [(WAIT, WRITE, 0), (WRITE, WAIT, 1), ("NOP", "NOP", 1)]
)
def test_writes_before_the_wait_are_found(first, second, hazards, tmp_path, capsys):
    text = LOOP.format(first=first, second=second)
    (loop,) = sass.loops(text)
    assert (loop.start, loop.end) == (0x100, 0x140) and len(loop.hazards) == hazards
    path = tmp_path / "kernel.sass"
    path.write_text(text)
    assert sass.main([str(path)]) == int(hazards > 0)
    assert "1 loops with wgmma from registers" in capsys.readouterr().out


def test_stores_and_other_registers_are_no_hazard():
    for harmless in ("STG.E.128 [R26], R4", "FADD R28, R1, R2", "ISETP.GE.AND P0, PT, R24, R2, PT"):
        (loop,) = sass.loops(LOOP.format(first=harmless, second=WAIT))
        assert loop.hazards == []
    (loop,) = sass.loops(LOOP.format(first="LDS.128 R22, [R2]", second=WAIT))
    assert len(loop.hazards) == 1  # R22 to R25


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "broken").write_bytes(b"\x7fELF nothing")
    assert sass.main([str(tmp_path / "broken")]) == 2
    assert "no disassembler could read it" in capsys.readouterr().out


AMD_GPUS = {"gfx942": 64, "gfx1100": 32}  # threads of a warp; both have 64 KiB of shared memory


@needs_tools
@pytest.mark.parametrize(
    ("gpu", "dtype"),
    [("gfx942", torch.bfloat16), ("gfx1100", torch.float16)],
    ids=str,
)
def test_kernels_compile_for_gpus_of_amd(gpu, dtype, monkeypatch):
    """One of each, with the tile that it would take there; of results `verify` has to tell."""
    import triton
    from triton.backends.compiler import GPUTarget

    from mi_kernels.ops.triton.launch import AMD
    from tools import variants

    monkeypatch.setattr(torch.version, "hip", "7.0")
    kinds = {launch.kernel.__name__: launch for launch in variants.launches(AMD, dtype, short=True)}
    assert len(kinds) > 4
    for launch in kinds.values():
        source, options = variants.source(launch, AMD)
        compiled = triton.compile(source, target=GPUTarget("hip", gpu, AMD_GPUS[gpu]), options=options)
        assert compiled.metadata.shared <= 64 << 10, launch.kernel.__name__

"""Multiplicative RNNs over whole sequences against the loops that an expert writes, and nn.LSTM.

    python benchmarks/suites/recurrent.py --threads 2 --rounds 5 --output benchmarks/results/NAME.json

How a case is measured stands in cases.py; the candidates run in one process, in turn. All loops have the
products with x over all steps before them: `eager`, `script` (torch.jit.script of the loop) and
`compile(step)` (torch.compile of what a step does; a whole loop under torch.compile is unrolled, and compiles
for minutes). `nn.LSTM`, oneDNN's, computes another function of the same sizes: its time is scaled by the
quotient of the multiplications, so that 1 means the same time for each. Sizes are T x B x X x H.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor

import mi_kernels as mi
from benchmarks.harness import cases
from benchmarks.harness.cases import OURS, Case, Yardstick

SIZES = ((128, 32, 128, 256), (512, 16, 256, 512), (64, 1, 64, 128), (100, 64, 512, 1024))
FEW = (SIZES[0], SIZES[2])
ONE_STEP = ((1, 1, 64, 128), (1, 8, 256, 512), (1, 32, 128, 256))
DENSE = ((128, 32, 32, 64), (64, 1, 64, 128))
Step = Callable[..., tuple[Tensor, ...]]


def lstm_cell(p: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = p.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def mlstm_step(
    gates_x: Tensor, factors_x: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, weight_mh: Tensor
) -> tuple[Tensor, Tensor]:
    m = factors_x * (h @ weight_mh.t())
    return lstm_cell(torch.addmm(gates_x, m, weight_hh.t()), c)


def mrnn_step(gates_x: Tensor, factors_x: Tensor, h: Tensor, weight_hh: Tensor, weight_mh: Tensor) -> Tensor:
    return torch.tanh(torch.addmm(gates_x, factors_x * (h @ weight_mh.t()), weight_hh.t()))


def mi_lstm_step(
    x: Tensor, h: Tensor, c: Tensor, weight_hh: Tensor, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    q = h @ weight_hh.t()
    return lstm_cell(q * (vectors[0] * x + vectors[1]) + (vectors[2] * x + vectors[3]), c)


def mi_rnn_step(x: Tensor, h: Tensor, weight_hh: Tensor, vectors: Tensor) -> Tensor:
    q = h @ weight_hh.t()
    return torch.tanh(q * (vectors[0] * x + vectors[1]) + (vectors[2] * x + vectors[3]))


def mi_gru_step(x: Tensor, h: Tensor, weight_hh: Tensor, vectors: Tensor) -> Tensor:
    units = 2 * h.shape[1]
    v, w = vectors[:, :units], vectors[:, units:]
    q, own = h @ weight_hh[:units].t(), x[:, :units]
    r, z = torch.sigmoid(q * (v[0] * own + v[1]) + (v[2] * own + v[3])).chunk(2, -1)
    q, own = (r * h) @ weight_hh[units:].t(), x[:, units:]
    n = torch.tanh(q * (w[0] * own + w[1]) + (w[2] * own + w[3]))
    return n + z * (h - n)


def dense_step(gates_x: Tensor, x: Tensor, h: Tensor, weight: Tensor, weight_hh: Tensor) -> Tensor:
    wide = x @ weight.permute(2, 0, 1).flatten(1)  # [B, H H], what a hypernetwork would generate
    q = torch.einsum("boz,bz->bo", wide.view(x.shape[0], weight.shape[0], weight.shape[1]), h)
    return torch.tanh(torch.addmm(gates_x, h, weight_hh.t()) + q)


def mlstm_loop(x: Tensor, ih: Tensor, hh: Tensor, mx: Tensor, mh: Tensor, bias: Tensor, step: Step) -> Tensor:
    gates_x, factors_x = F.linear(x, ih, bias), F.linear(x, mx)
    h = c = x.new_zeros(x.shape[1], mh.shape[1])
    outputs = []
    for gate, factor in zip(gates_x, factors_x, strict=True):
        h, c = step(gate, factor, h, c, hh, mh)
        outputs.append(h)
    return torch.stack(outputs)


def mrnn_loop(x: Tensor, ih: Tensor, hh: Tensor, mx: Tensor, mh: Tensor, bias: Tensor, step: Any) -> Tensor:
    gates_x, factors_x = F.linear(x, ih, bias), F.linear(x, mx)
    h = x.new_zeros(x.shape[1], mh.shape[1])
    outputs = []
    for gate, factor in zip(gates_x, factors_x, strict=True):
        h = step(gate, factor, h, hh, mh)
        outputs.append(h)
    return torch.stack(outputs)


def mi_lstm_loop(x: Tensor, ih: Tensor, hh: Tensor, vectors: Tensor, step: Step) -> Tensor:
    gates_x = F.linear(x, ih)
    h = c = x.new_zeros(x.shape[1], hh.shape[1])
    outputs = []
    for gate in gates_x:
        h, c = step(gate, h, c, hh, vectors)
        outputs.append(h)
    return torch.stack(outputs)


def mi_loop(x: Tensor, ih: Tensor, hh: Tensor, vectors: Tensor, step: Any) -> Tensor:
    gates_x = F.linear(x, ih)
    h = x.new_zeros(x.shape[1], hh.shape[1])
    outputs = []
    for gate in gates_x:
        h = step(gate, h, hh, vectors)
        outputs.append(h)
    return torch.stack(outputs)


def dense_loop(x: Tensor, ih: Tensor, hh: Tensor, weight: Tensor, bias: Tensor, step: Any) -> Tensor:
    gates_x = F.linear(x, ih, bias)
    h = x.new_zeros(x.shape[1], hh.shape[1])
    outputs = []
    for gate, own in zip(gates_x, x, strict=True):
        h = step(gate, own, h, weight, hh)
        outputs.append(h)
    return torch.stack(outputs)


# TorchScript compiles no function that is an argument, so its loops name their steps.
def mlstm_script(x: Tensor, ih: Tensor, hh: Tensor, mx: Tensor, mh: Tensor, bias: Tensor) -> Tensor:
    gates_x, factors_x = F.linear(x, ih, bias), F.linear(x, mx)
    h = torch.zeros(x.shape[1], mh.shape[1], dtype=x.dtype)
    c = h
    outputs = []
    for t in range(x.shape[0]):
        h, c = mlstm_step(gates_x[t], factors_x[t], h, c, hh, mh)
        outputs.append(h)
    return torch.stack(outputs)


def mrnn_script(x: Tensor, ih: Tensor, hh: Tensor, mx: Tensor, mh: Tensor, bias: Tensor) -> Tensor:
    gates_x, factors_x = F.linear(x, ih, bias), F.linear(x, mx)
    h = torch.zeros(x.shape[1], mh.shape[1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[0]):
        h = mrnn_step(gates_x[t], factors_x[t], h, hh, mh)
        outputs.append(h)
    return torch.stack(outputs)


def mi_lstm_script(x: Tensor, ih: Tensor, hh: Tensor, vectors: Tensor) -> Tensor:
    gates_x = F.linear(x, ih)
    h = torch.zeros(x.shape[1], hh.shape[1], dtype=x.dtype)
    c = h
    outputs = []
    for t in range(x.shape[0]):
        h, c = mi_lstm_step(gates_x[t], h, c, hh, vectors)
        outputs.append(h)
    return torch.stack(outputs)


def mi_rnn_script(x: Tensor, ih: Tensor, hh: Tensor, vectors: Tensor) -> Tensor:
    gates_x = F.linear(x, ih)
    h = torch.zeros(x.shape[1], hh.shape[1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[0]):
        h = mi_rnn_step(gates_x[t], h, hh, vectors)
        outputs.append(h)
    return torch.stack(outputs)


def mi_gru_script(x: Tensor, ih: Tensor, hh: Tensor, vectors: Tensor) -> Tensor:
    gates_x = F.linear(x, ih)
    h = torch.zeros(x.shape[1], hh.shape[1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[0]):
        h = mi_gru_step(gates_x[t], h, hh, vectors)
        outputs.append(h)
    return torch.stack(outputs)


def dense_script(x: Tensor, ih: Tensor, hh: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    gates_x = F.linear(x, ih, bias)
    h = torch.zeros(x.shape[1], hh.shape[1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[0]):
        h = dense_step(gates_x[t], x[t], h, weight, hh)
        outputs.append(h)
    return torch.stack(outputs)


def factored(kind: str) -> Callable[..., Tensor]:
    def ours(x: Tensor, ih: Tensor, hh: Tensor, mx: Tensor, mh: Tensor, bias: Tensor) -> Tensor:
        return mi.multiplicative_rnn(kind, x, None, ih, hh, bias, weight_mx=mx, weight_mh=mh)[0]

    return ours


def integrated(kind: str) -> Callable[..., Tensor]:
    def ours(x: Tensor, ih: Tensor, hh: Tensor, vectors: Tensor) -> Tensor:
        alpha, beta_h, beta_x, bias = vectors
        given = {"alpha": alpha, "beta_h": beta_h, "beta_x": beta_x}
        return mi.multiplicative_rnn(kind, x, None, ih, hh, bias, **given)[0]

    return ours


def dense(x: Tensor, ih: Tensor, hh: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return mi.multiplicative_rnn("second_order", x, None, ih, hh, bias, weight=weight)[0]


def nn_lstm(x: Tensor, ih: Tensor, hh: Tensor, first: Tensor, second: Tensor) -> Tensor:
    zeros = x.new_zeros(1, x.shape[1], hh.shape[1])
    return torch.lstm(x, (zeros, zeros), (ih, hh, first, second), True, 1, 0.0, False, False, False)[0]


def yardstick(size: tuple[int, int, int, int], gates: float, factors: int, products: int) -> Yardstick:
    """nn.LSTM, with our multiplications by its own: of gates by x and h, or with `factors` by m."""
    _, _, width, units = size
    ours = units * (width * (gates + factors) + units * (gates + factors)) if not products else products
    sizes = (size[:3], (4 * units, width), (4 * units, units), (4 * units,), (4 * units,))
    return Yardstick(nn_lstm, sizes, ours / (4 * units * (width + units)))


def case(
    family: str,
    size: tuple[int, int, int, int],
    weights: tuple[tuple[int, ...], ...],
    ours: Callable[..., Tensor],
    loop: Callable[..., Tensor],
    step: Any,
    script: Callable[..., Tensor],
    lstm: Yardstick,
) -> Case:
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # a step is compiled for each dtype, pass, and kind of state
    compiled = torch.compile(step, dynamic=False, fullgraph=True)
    functions = {
        OURS: ours,
        "eager": lambda *tensors: loop(*tensors, step),
        "script": torch.jit.script(script),
        "compile(step)": lambda *tensors: loop(*tensors, compiled),
    }
    name = "x".join(map(str, size))
    return Case(family, name, (size[:3], *weights), functions, scaled=1, yardsticks={"nn.LSTM": lstm})


def factored_cases(kind: str, gates: int, sizes: Any, loop: Any, step: Any, script: Any) -> Iterator[Case]:
    for size in sizes:
        _, _, width, units = size
        rows = gates * units
        weights = ((rows, width), (rows, units), (units, width), (units, units), (rows,))
        yield case(kind, size, weights, factored(kind), loop, step, script, yardstick(size, gates, 1, 0))


def integrated_cases(kind: str, gates: int, sizes: Any, loop: Any, step: Any, script: Any) -> Iterator[Case]:
    for size in sizes:
        _, _, width, units = size
        rows = gates * units
        weights = ((rows, width), (rows, units), (4, rows))
        yield case(kind, size, weights, integrated(kind), loop, step, script, yardstick(size, gates, 0, 0))


def dense_cases() -> Iterator[Case]:
    for size in DENSE:
        _, _, width, units = size
        weights = ((units, width), (units, units), (units, units, width), (units,))
        lstm = yardstick(size, 1, 0, units * (width + units + units * width))
        yield case("second_order", size, weights, dense, dense_loop, dense_step, dense_script, lstm)


FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {
    "mlstm": lambda: factored_cases("mlstm", 4, SIZES, mlstm_loop, mlstm_step, mlstm_script),
    "mi_lstm": lambda: integrated_cases("mi_lstm", 4, SIZES, mi_lstm_loop, mi_lstm_step, mi_lstm_script),
    "mrnn": lambda: factored_cases("mrnn", 1, FEW, mrnn_loop, mrnn_step, mrnn_script),
    "mi_rnn": lambda: integrated_cases("mi_rnn", 1, FEW, mi_loop, mi_rnn_step, mi_rnn_script),
    "mi_gru": lambda: integrated_cases("mi_gru", 3, FEW, mi_loop, mi_gru_step, mi_gru_script),
    "second_order": dense_cases,
    "step": lambda: factored_cases("mlstm", 4, ONE_STEP, mlstm_loop, mlstm_step, mlstm_script),
}


def main(argv: list[str] | None = None) -> int:
    options = cases.parser("Multiplicative RNNs against loops in PyTorch.", FAMILIES).parse_args(argv)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    command = ["python", "benchmarks/suites/recurrent.py", *(sys.argv[1:] if argv is None else argv)]
    cases.run(FAMILIES, options, command)
    return 0


if __name__ == "__main__":
    sys.exit(main())

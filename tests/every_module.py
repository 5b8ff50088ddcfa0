"""A fresh module of every class of mi.nn, and what it is called with, for tests of what all share."""

import torch
from torch import Tensor, nn

import mi_kernels as mi

ROWS, X, Z, O = 6, 4, 3, 5  # noqa: E741
_PAIR = {"in_features": X, "context_features": Z, "out_features": O}
_OWN = {"features": X, "context_features": Z}
_ROWS, _SEQUENCE = ((ROWS, X), (ROWS, Z)), ((7, ROWS, X),)
_CELLS = (
    "MultiplicativeRNN",
    "MultiplicativeIntegrationRNN",
    "MultiplicativeIntegrationGRU",
    "SecondOrderRNN",
)

# The arguments of the constructor, and the sizes of the inputs.
CASES: dict[str, tuple[dict, tuple[tuple[int, ...], ...]]] = {
    "MultiplicativeInteraction": (_PAIR, _ROWS),
    "Bilinear": ({"in1_features": Z, "in2_features": X, "out_features": O}, ((ROWS, Z), (ROWS, X))),
    "Biaffine": ({"in1_features": Z, "in2_features": X, "out_features": O}, ((2, ROWS, Z), (2, 7, X))),
    "LowRankInteraction": (_PAIR | {"rank": 7, "activation_z": "tanh"}, _ROWS),
    "DiagonalInteraction": (_OWN | {"activation": "tanh", "weight_x": True}, _ROWS),
    "GatedInteraction": (_OWN, _ROWS),
    "FiLM": (_OWN, ((ROWS, X, 2, 2), (ROWS, Z))),
    "GLU": ({"in_features": X, "out_features": O}, ((2, ROWS, X),)),
    "GatedMLP": ({"features": X, "hidden_features": 8}, ((2, ROWS, X),)),
    "HyperLinear": (_PAIR, ((ROWS, 7, X), (ROWS, 1, Z))),
    "HyperMLP": ({"sizes": [X, 8, O], "context_features": Z}, ((ROWS, 7, X), (ROWS, Z))),
    "HyperLoRA": ({"linear": (X, O), "context_features": Z, "rank": 2}, ((ROWS, 7, X), (ROWS, Z))),
    "BoundLinear": ({"weight": (ROWS, O, X), "bias": (ROWS, O)}, ((ROWS, X),)),
    "AdaLayerNorm": (_OWN | {"affine": True}, ((2, ROWS, X), (2, Z))),
    "AdaRMSNorm": (_OWN | {"affine": True}, ((2, ROWS, X), (2, Z))),
    "AdaGroupNorm": (_OWN | {"groups": 2}, ((ROWS, X, 2, 2), (ROWS, Z))),
    "AdaLNZeroBlock": (_OWN, ((2, ROWS, X), (2, Z))),
    "MultiplicativeLSTM": ({"input_size": X, "hidden_size": O, "num_factors": 2, "proj_size": 3}, _SEQUENCE),
    "MultiplicativeIntegrationLSTM": ({"input_size": X, "hidden_size": O, "num_layers": 2}, _SEQUENCE),
    **{name: ({"input_size": X, "hidden_size": O}, _SEQUENCE) for name in _CELLS},
    "MultiplicativeLSTMCell": ({"input_size": X, "hidden_size": O}, ((ROWS, X),)),
    "MultiplicativeIntegrationLSTMCell": ({"input_size": X, "hidden_size": O}, ((ROWS, X),)),
    **{f"{name}Cell": ({"input_size": X, "hidden_size": O}, ((ROWS, X),)) for name in _CELLS},
}


def made(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """A module all of whose parameters are drawn: none is 0, as some are initialised."""
    torch.manual_seed(seed)
    options = dict(CASES[name][0])
    if name == "HyperLoRA":
        options["linear"] = nn.Linear(*options["linear"])
    elif name == "BoundLinear":
        options = {key: torch.randn(sizes) for key, sizes in options.items()}
    elif name == "AdaLNZeroBlock":
        options |= {"attn": nn.Linear(X, X), "mlp": nn.Linear(X, X)}
    module = getattr(mi.nn, name)(**options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_().mul_(0.5)
    return module.to(dtype)


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(sizes, generator=generator, dtype=dtype) for sizes in CASES[name][1])


def result(outputs: Tensor | tuple) -> Tensor:
    """The first one: y of recurrent layers and their cells is followed by states."""
    while not isinstance(outputs, Tensor):
        outputs = outputs[0]
    return outputs

"""What the tests of the modules of multiplicative RNNs share."""

import torch
from torch import nn

import mi_kernels as mi

X, H = 4, 5


def _maker(module, **own):
    return lambda input_size=X, hidden_size=H, **options: module(input_size, hidden_size, **own, **options)


# Of every kind, with each form of its parameters.
SIZES = {
    "mlstm": _maker(mi.nn.MultiplicativeLSTM),
    "mlstm-projected": _maker(mi.nn.MultiplicativeLSTM, num_factors=3, proj_size=1),
    "mrnn": _maker(mi.nn.MultiplicativeRNN, num_factors=7),
    "mi_rnn": _maker(mi.nn.MultiplicativeIntegrationRNN, nonlinearity="sigmoid"),
    "mi_lstm": _maker(mi.nn.MultiplicativeIntegrationLSTM),
    "mi_gru": _maker(mi.nn.MultiplicativeIntegrationGRU, bias=False),
    "second_order": _maker(mi.nn.SecondOrderRNN),
    "second_order-rank": _maker(mi.nn.SecondOrderRNN, rank=2, nonlinearity="identity"),
}
# Those that are loops of their cells, which have no projections.
LAYERS = {name: make for name, make in SIZES.items() if name != "mlstm-projected"}
LSTMS = ("MultiplicativeLSTM", "MultiplicativeIntegrationLSTM")


def draw(*sizes):
    return torch.randn(*sizes, dtype=torch.float64)


def drawn(layer, seed=2):
    """In float64, every parameter drawn anew, of a size that leaves activations out of saturation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.double().parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return layer


def equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def without_products(ours, theirs):
    """Ours with the state dict of a module of PyTorch, alpha = 0 and both betas 1."""
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and all(name.startswith(("alpha", "beta_h", "beta_x")) for name in missing)
    for name, parameter in ours.named_parameters():
        if name in missing:
            nn.init.constant_(parameter, 0.0 if name.startswith("alpha") else 1.0)
    return ours


def cell_of(layer, suffix):
    """The cell of a layer and direction, with its parameters."""
    shared = ("bias", "nonlinearity", "num_factors", "rank")
    options = {name: getattr(layer, name) for name in shared if hasattr(layer, name)}
    if type(layer).__name__ in (*LSTMS, "MultiplicativeIntegrationGRU"):
        del options["nonlinearity"]
    width = getattr(layer, f"weight_ih{suffix}").shape[1]
    cell = getattr(mi.nn, f"{type(layer).__name__}Cell")(width, layer.hidden_size, **options).double()
    state = layer.state_dict()
    cell.load_state_dict({k.removesuffix(suffix): t for k, t in state.items() if k.endswith(suffix)})
    return cell

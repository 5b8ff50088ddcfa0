"""Modules: parameters, initialisation and state dict. The arithmetic is in the public functions.

All modules of an input ``x`` and a context ``z`` pair them by one rule. For x ``[B, T, X]``, where T stands
for any number of dimensions (of feature maps, all but samples and channels):

* ``z [Z]`` is one context for all;
* ``z [B, Z]`` has one context per sample: the leading dimensions of z are the first ones of x, and where it
  has fewer it is used as ``[B, 1, Z]``;
* ``z [B, T, Z]`` has one per position; a size of 1 is shared, as in ``[B, 1, Z]`` and ``[1, T, Z]``.

Where B = T, PyTorch's broadcasting would read ``[B, Z]`` per position: a ValueError asks for ``[B, 1, Z]`` or
``[1, T, Z]``. (A program of ``torch.export``, whose sizes are not known yet, reads it per sample.) Layers
that are bound to contexts (:class:`BoundLinear`) keep the rule. The public functions, such as
:func:`mi_kernels.interaction`, broadcast as PyTorch does; so does, in modules, a context with more dimensions
than x, which :class:`FiLM`, whose result has the shape of x, refuses.
"""

from . import _script
from . import rules as rules  # a module of functions
from .biaffine import Biaffine
from .gates import DiagonalInteraction, FiLM, GatedInteraction
from .glu import GLU, GatedMLP
from .hyper import BoundLinear, HyperLinear, HyperMLP
from .interaction import Bilinear, MultiplicativeInteraction
from .lora import HyperLoRA
from .low_rank import LowRankInteraction
from .norms import AdaGroupNorm, AdaLayerNorm, AdaLNZeroBlock, AdaRMSNorm
from .recurrent import (
    MultiplicativeIntegrationGRU,
    MultiplicativeIntegrationLSTM,
    MultiplicativeIntegrationRNN,
    MultiplicativeLSTM,
    MultiplicativeRNN,
    SecondOrderRNN,
)
from .recurrent_cells import (
    MultiplicativeIntegrationGRUCell,
    MultiplicativeIntegrationLSTMCell,
    MultiplicativeIntegrationRNNCell,
    MultiplicativeLSTMCell,
    MultiplicativeRNNCell,
    SecondOrderRNNCell,
)

__all__ = [
    "GLU",
    "AdaGroupNorm",
    "AdaLNZeroBlock",
    "AdaLayerNorm",
    "AdaRMSNorm",
    "Biaffine",
    "Bilinear",
    "BoundLinear",
    "DiagonalInteraction",
    "FiLM",
    "GatedInteraction",
    "GatedMLP",
    "HyperLinear",
    "HyperLoRA",
    "HyperMLP",
    "LowRankInteraction",
    "MultiplicativeIntegrationGRU",
    "MultiplicativeIntegrationGRUCell",
    "MultiplicativeIntegrationLSTM",
    "MultiplicativeIntegrationLSTMCell",
    "MultiplicativeIntegrationRNN",
    "MultiplicativeIntegrationRNNCell",
    "MultiplicativeInteraction",
    "MultiplicativeLSTM",
    "MultiplicativeLSTMCell",
    "MultiplicativeRNN",
    "MultiplicativeRNNCell",
    "SecondOrderRNN",
    "SecondOrderRNNCell",
]

for _name in __all__:
    globals()[_name].__prepare_scriptable__ = _script.refuse

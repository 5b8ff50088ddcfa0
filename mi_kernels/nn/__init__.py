"""Modules: parameters, initialisation and state dict. The arithmetic is in the public functions."""

from mi_kernels.nn import rules as rules  # a module of functions
from mi_kernels.nn.biaffine import Biaffine
from mi_kernels.nn.gates import DiagonalInteraction, FiLM, GatedInteraction
from mi_kernels.nn.hyper import BoundLinear, HyperLinear, HyperMLP
from mi_kernels.nn.interaction import Bilinear, MultiplicativeInteraction

__all__ = [
    "Biaffine",
    "Bilinear",
    "BoundLinear",
    "DiagonalInteraction",
    "FiLM",
    "GatedInteraction",
    "HyperLinear",
    "HyperMLP",
    "MultiplicativeInteraction",
]

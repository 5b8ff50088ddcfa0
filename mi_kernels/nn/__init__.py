"""Modules: parameters, initialisation and state dict. The arithmetic is in `mi_kernels.functional`."""

from mi_kernels.nn.interaction import Bilinear, MultiplicativeInteraction

__all__ = ["Bilinear", "MultiplicativeInteraction"]

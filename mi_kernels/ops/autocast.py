"""Autocast is asked for in one place, in words that Dynamo traces in every supported release of PyTorch."""

import torch


def dtype_in_force(device: str) -> torch.dtype | None:
    """The autocast dtype for tensors on this type of device, or None outside autocast.

    Dynamo answers it while it traces, and guards on autocast: another state is another graph.
    """
    if not _available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


@torch.compiler.assume_constant_result  # Dynamo of PyTorch 2.11 cannot trace the question
def _available(device: str) -> bool:
    # Asking whether autocast is enabled raises on devices that have none, such as meta.
    return torch.amp.is_autocast_available(device)

"""GPU state checks between tests and between measurements."""

import torch


def ruined(device: str | torch.device) -> bool:
    """Whether the device is unusable in this process, as after an illegal access."""
    try:
        return torch.ones(1, device=device).add(1).item() != 2
    except RuntimeError:
        return True


def finish(device: str | torch.device) -> None:
    """Synchronise the device; raises pending errors."""
    torch.cuda.synchronize(device)

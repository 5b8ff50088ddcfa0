"""Questions to a device."""

import torch


def ruined(device: str | torch.device) -> bool:
    """Whether nothing runs on it any more, as after an illegal access."""
    try:
        return torch.ones(1, device=device).add(1).item() != 2
    except RuntimeError:
        return True

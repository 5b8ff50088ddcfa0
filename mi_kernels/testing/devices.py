"""What a GPU is asked between tests and between measurements."""

import torch


def ruined(device: str | torch.device) -> bool:
    """Whether nothing runs there any more in this process, as after an illegal access."""
    try:
        return torch.ones(1, device=device).add(1).item() != 2
    except RuntimeError:
        return True


def finish(device: str | torch.device) -> None:
    """Wait until it has done all that it was given; raises what went wrong there."""
    torch.cuda.synchronize(device)

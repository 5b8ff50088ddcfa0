"""The dtypes of operands and of accumulators."""

import torch

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DTYPES = (*FLOATING, *INTEGERS)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of partial sums."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype

"""
Gradient checks and microbenchmarks for operations of your own
==============================================================

The judge of this package's tests is public: ``mi_kernels.testing`` says whether an implementation is as exact
as it can be in its dtype, and how much memory it takes. Neither knows anything of multiplicative
interactions.
"""

# %%
# An operation with a derivative by hand
# --------------------------------------
#
# RMS normalisation, y = x w / sqrt(mean(x^2)), with a derivative of its own, and with sums of half precision
# in float32.

import matplotlib.pyplot as plt
import torch
from torch.autograd import gradcheck

from mi_kernels.testing.errors import check_errors, check_second_order_errors, relative_error
from mi_kernels.testing.memory import peak_memory


def wide(*tensors):
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x, weight):
        a, w = wide(x, weight)
        return (a * a.square().mean(-1, keepdim=True).rsqrt() * w).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight, grad = wide(*ctx.saved_tensors, grad)
        scale = x.square().mean(-1, keepdim=True).rsqrt()
        g = grad * weight
        dx = scale * g - x * scale**3 * (g * x).mean(-1, keepdim=True)
        return dx.to(ctx.saved_tensors[0].dtype), (grad * x * scale).sum(0).to(ctx.saved_tensors[1].dtype)


# %%
# Are the derivatives right?
# --------------------------
#
# PyTorch's ``gradcheck`` compares with finite differences, in float64.

x, weight = torch.randn(6, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
print(gradcheck(RMSNorm.apply, (x.requires_grad_(), weight.requires_grad_())))

# %%
# Are they exact enough in the dtype that you use?
# ------------------------------------------------
#
# Which error is too large? A tolerance that somebody chose is too wide for one dtype and too narrow for the
# next. The error rule asks PyTorch instead: with the formula in float64 as the truth, the error may be twice
# that of the plain formula in the same dtype, and no single element may be off by more than four times as
# much as the worst of the plain formula. Arguments are drawn from seeds until there are enough elements for
# that comparison to mean something.


def formula(x, weight):
    return (torch.nn.functional.rms_norm(x, x.shape[-1:], weight),)


def gradients(function):
    """dx and dw of a function, for a cotangent that is an argument too."""

    def called(grad, x, weight):
        leaves = [t.detach().requires_grad_() for t in (x, weight)]
        return torch.autograd.grad(function(*leaves), leaves, grad)

    return called


def draw(dtype):
    def drawn(seed):
        made = torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=made).to(dtype) for shape in ((40, 64), (64,))]

    return drawn


def squares(x, weight):
    """The squared scale of each result, from float64: what rounding may cost where results cancel."""
    return (formula(x, weight)[0].square(),)


for dtype in (torch.float64, torch.float32, torch.float16):
    part = check_errors(lambda *t: (RMSNorm.apply(*t),), formula, draw(dtype), squares=squares)
    print(f"{dtype}: {part:.2f} of what is allowed")

# %%
# And the gradients, of the cotangent and the arguments:


def gradients_of_formula(*arguments):
    return gradients(lambda x, weight: formula(x, weight)[0])(*arguments)


def cotangent_and_arguments(seed):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=made) for shape in ((40, 64), (40, 64), (64,))]


def gradient_squares(grad, x, weight):
    scale = x.square().mean(-1, keepdim=True).rsqrt()
    mean = (grad.square() * weight.square() * x.square()).mean(-1, keepdim=True) / x.shape[-1]
    return (scale * grad * weight).square() + x.square() * scale**6 * mean, (grad * x * scale).square().sum(0)


part = check_errors(
    gradients(RMSNorm.apply), gradients_of_formula, cotangent_and_arguments, squares=gradient_squares
)
print(f"gradients: {part:.2f} of what is allowed")

# %%
# What it finds
# -------------
#
# The same operation with its sums in half precision, as a careless version has them. In float16 the sum of
# the squares of larger inputs overflows, and the rule says so.


def careless(x, weight):
    return ((x * x.pow(2).sum(-1, keepdim=True).div(x.shape[-1]).rsqrt() * weight),)


large = lambda seed: [t * 30 for t in draw(torch.float16)(seed)]  # noqa: E731
try:
    check_errors(careless, formula, large, squares=squares)
except AssertionError as error:
    print(error)

# %%
# Second derivatives
# ------------------
#
# ``check_second_order_errors`` does so for gradients of gradients; the last tensor that is drawn is the
# cotangent of y. For a sum of products no squares have to be given: their scale is the same function of
# squared inputs.

import mi_kernels as mi  # noqa: E402


def interaction(x, z, w):
    return torch.einsum("bi,oij,bj->bo", z, w, x)


def arguments(seed):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=made) for shape in ((30, 8), (30, 6), (7, 6, 8), (30, 7))]


part = check_errors(lambda *t: (mi.interaction(*t[:3]),), lambda *t: (interaction(*t[:3]),), arguments)
print(f"values: {part:.2f} of what is allowed")
part = check_second_order_errors(mi.interaction, interaction, arguments)
print(f"second derivatives: {part:.2f} of what is allowed")

# %%
# How far from the truth, in numbers
# ----------------------------------
#
# ``relative_error`` is the distance from a float64 result.

x, z, w, _ = arguments(0)
print(f"{relative_error(mi.interaction(x, z, w), interaction(x.double(), z.double(), w.double())):.1e}")

# %%
# How much memory
# ---------------
#
# ``peak_memory`` is the most that was allocated at one time while a function ran, results included, from
# PyTorch's own allocator: it is exact, and needs no quiet machine. Here, forward and backward of three ways
# to the same numbers.

ways = {
    "einsum": interaction,
    "outer product": lambda x, z, w: (z.unsqueeze(-1) * x.unsqueeze(-2)).flatten(1) @ w.flatten(1).T,
    "mi.interaction": mi.interaction,
}
sizes = [64, 128, 256, 512, 1024, 2048]


def used_by(function, rows):
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((rows, 64), (rows, 32), (48, 32, 64))]

    def step():
        return torch.autograd.grad(function(*leaves).sum(), leaves)

    step()  # what a first call caches is not counted
    return peak_memory(step) / 2**20


plt.figure(figsize=(6, 3.4), layout="constrained")
for name, function in ways.items():
    plt.loglog(sizes, [used_by(function, rows) for rows in sizes], "o-", label=name)
plt.xlabel("rows")
plt.ylabel("peak memory, MiB")
plt.legend()
plt.show()

# %%
# How fast
# --------
#
# Times of two implementations mean something only if both run in one process, in turn, on a machine that does
# nothing else. ``python -m mi_kernels bench`` does this for the operations of this package in a checkout of
# the repository, and its harness says in ``benchmarks/README.md`` what makes a number trustworthy. For an
# operation of your own, ``torch.utils.benchmark`` with the two taking turns is a beginning; quote their
# ratio, and how much it varies.

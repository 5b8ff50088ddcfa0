"""What `kernels benchmark` runs on a repository of the kernels hub; `self.kernel` is the package.

What `verify_...` computes is what a user would write without this package, and its time is the reference. For
measurements against the strongest rivals, interleaved: benchmarks/README.md.
"""

import torch
from kernels.benchmark import Benchmark


class Interaction(Benchmark):
    """z^T W x, and its shared contexts."""

    seed = 0

    def _draw(self, rows: int, context: int, width: int, out: int) -> None:
        def randn(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device=self.device) / sizes[-1] ** 0.5

        self.x, self.z, self.weight = randn(rows, width), randn(rows, context), randn(out, context, width)

    def setup_dense(self) -> None:
        self._draw(256, 64, 128, 128)

    def benchmark_dense(self) -> None:
        self.out = self.kernel.interaction(self.x, self.z, self.weight)

    def verify_dense(self) -> torch.Tensor:
        return torch.einsum("bi,oij,bj->bo", self.z, self.weight, self.x)

    def setup_few_outputs(self) -> None:
        self._draw(1024, 64, 128, 4)

    def benchmark_few_outputs(self) -> None:
        self.out = self.kernel.interaction(self.x, self.z, self.weight)

    def verify_few_outputs(self) -> torch.Tensor:
        return torch.nn.functional.bilinear(self.z, self.x, self.weight)


class Gates(Benchmark):
    """FiLM of tokens, and SwiGLU."""

    seed = 0

    def setup_modulate(self) -> None:
        self.x = torch.randn(8, 256, 512, device=self.device)
        self.scale, self.shift = (torch.randn(8, 1, 512, device=self.device) for _ in range(2))

    def benchmark_modulate(self) -> None:
        self.out = self.kernel.modulate(self.x, self.scale, self.shift, scale_offset=1.0)

    def verify_modulate(self) -> torch.Tensor:
        return self.x * (1 + self.scale) + self.shift

    def setup_glu(self) -> None:
        self.x = torch.randn(256, 256, device=self.device)
        self.weight = torch.randn(1024, 256, device=self.device) / 16

    def benchmark_glu(self) -> None:
        self.out = self.kernel.glu(self.x, self.weight)

    def verify_glu(self) -> torch.Tensor:
        gate, value = (self.x @ self.weight.T).chunk(2, -1)
        return torch.nn.functional.silu(gate) * value

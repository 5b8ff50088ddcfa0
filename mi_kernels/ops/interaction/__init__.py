"""The dense interaction y = z^T W x + U z + V x + c and its two adjoint primitives."""

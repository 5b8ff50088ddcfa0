"""The dense gate y = act(z^T W x + U z + V x + c) * x."""

"""The diagonal form y = (act(z A^T + x G^T + a) + s) * x + (z C^T + c)."""

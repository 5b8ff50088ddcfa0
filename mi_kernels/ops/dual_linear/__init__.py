"""Two linear maps whose results are multiplied, y = sum_r f(A_r x + a_r) * h(C_r z + c_r), in one pass."""

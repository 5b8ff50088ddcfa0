"""What is measured: shapes, and the calls and rivals of each family."""

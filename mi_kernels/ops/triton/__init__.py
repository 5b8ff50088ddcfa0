"""What the Triton kernels of all families share. Imported only where a Triton operation is called."""

"""Kernels side by side in machine code, without a GPU: ours and those of others, for one target with one triton."""

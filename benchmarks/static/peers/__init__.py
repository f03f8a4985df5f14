"""Kernels of others, each called by its own launcher on CPU tensors of the sizes of the pattern beside it."""

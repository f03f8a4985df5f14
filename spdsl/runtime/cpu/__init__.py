"""The CPU path: the visits of the kernels, on torch."""

"""Device functions of all kernels: arguments, positions, loads, blocks, the running softmax."""

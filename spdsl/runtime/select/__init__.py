"""Choosing units: ranks in kernels, the same in torch, scores as results."""

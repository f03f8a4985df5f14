"""Compression: cells, pools in torch and in kernels, entries that close in a cache."""

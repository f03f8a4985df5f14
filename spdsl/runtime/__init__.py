"""What generated modules share: kernels' functions, launches, the cache, the CPU path, tables and tuning.

The lowest layer: it needs torch, and triton on a GPU, and nothing of the compiler. Modules see it as `rt` (rt.py).
"""

"""Softmaxes that leave tiles out while they run: the vote, what is noted, the path without kernels."""

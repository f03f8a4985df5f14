"""Pools: how a cell of tokens becomes an entry, a file for each."""

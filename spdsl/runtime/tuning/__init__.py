"""Configurations: tables and models free of torch, and what tuning found on a GPU."""

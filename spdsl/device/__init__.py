"""Ordinary Triton and torch functions, copied as text into generated modules; and tables and models free of both."""

"""Two checkouts side by side: the same numbers, and kernels that are no worse.

`python -m benchmarks.compare results OLD NEW` runs every published pattern in every phase in both, on the CPU path and
interpreted, and compares bit by bit. `python -m benchmarks.compare reports OLD.json NEW.json` compares two files that
`spdsl compile --report --format json` has written.
"""

"""Starting kernels, and what becomes of their parts: merges, joins, gates."""

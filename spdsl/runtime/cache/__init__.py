"""The cache of a layer: pages, appended tokens, closed entries."""

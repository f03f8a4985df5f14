"""From text to tree: reading, parsing, and every limit on what a source may hold."""

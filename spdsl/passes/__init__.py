"""The steps between the tree and the plan, one function per file, named as the file."""

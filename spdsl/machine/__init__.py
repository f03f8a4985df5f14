"""What runs or compiles generated modules; the only part of the compiler that imports torch and triton."""

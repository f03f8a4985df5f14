"""The meaning of a pattern in float64 (`dense`), from an interpreter of its expressions (`evaluate`)."""

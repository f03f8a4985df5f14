"""What a call begins and ends with: arguments, lists of blocks, cases, the float64 reference, examples."""

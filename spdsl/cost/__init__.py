"""What a pattern costs, before anything runs: operations, bytes and launches of every kernel, time by a roofline."""

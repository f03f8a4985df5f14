"""The GPU suite: numerics of every pattern, then times beside SDPA, FlexAttention and the copy bandwidth."""

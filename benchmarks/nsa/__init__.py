"""The suite of Native Sparse Attention on a GPU: right at real sizes first, then times by branch, beside its peers."""

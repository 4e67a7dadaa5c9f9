"""Public operations: one module per op with its checks, its custom ops and its backends."""

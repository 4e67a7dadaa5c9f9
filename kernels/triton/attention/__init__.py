"""Device code of packed, hybrid and linear attention."""

"""Device code of linear attention: rows applied to states, and the gradient of a decay."""

"""Models built on the ops: the encoder and the spatial-temporal scene graph; import their submodules."""

"""The ahead-of-time check: every kernel in every shipped config is compiled for its GPUs, on a machine without one.

`python -m benchmarks.aot` prints the resources of each compiled kernel and fails if a limit is broken.
"""

"""Ahead-of-time gate: every kernel in every shipped config is compiled for its GPUs, on a machine without one.

`python -m benchmarks.aot` prints what the compiler made of them and fails where a limit is broken.
"""

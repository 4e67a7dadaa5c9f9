"""Obviously correct, differentiable PyTorch for every op: the one oracle for tests and benchmarks."""

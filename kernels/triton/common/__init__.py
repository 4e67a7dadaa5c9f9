"""Device code that several kernels share: the rows that a program works on, loads and stores, softmax by blocks."""

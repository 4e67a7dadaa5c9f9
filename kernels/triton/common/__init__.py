"""What several kernels share: which rows a program works on."""

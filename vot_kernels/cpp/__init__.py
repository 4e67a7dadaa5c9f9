"""The C++ kernels for CPUs: `build` compiles them, `library` loads them. The sources are in `csrc/`."""

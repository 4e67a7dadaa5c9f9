"""`python -m vot_kernels.cli` is `vot`."""

from vot_kernels.cli import main

main()

"""`python -m vot_kernels.train` is `vot train`, for torchrun, which takes the name of a module."""

from vot_kernels.cli import main
from vot_kernels.cli.train import train_app

main(train_app)

"""Random calls of every public op, compared with the references: `python -m tests.fuzz --calls 10000`."""

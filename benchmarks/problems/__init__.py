"""The functions that are measured: sizes, inputs, oracle and least work of each. One file per family."""

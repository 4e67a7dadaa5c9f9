"""The functions that are measured: sizes, inputs, oracle and minimal work of each. One file per family."""

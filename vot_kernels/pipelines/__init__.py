"""From files to results: what the command line runs, usable from Python."""

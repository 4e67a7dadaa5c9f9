"""The command line: `vot ask`, `encode`, `data`, `train`, `eval`, `info`, `tune` and `demo`, a file each.

Heavy modules are imported by the command that needs them, and only after its files and outputs were checked, so that
`vot --help` and a bad file are answered at once. An error is one sentence on stderr and the exit code 2; a result that
is incomplete, 1; Ctrl-C, one sentence on what is kept, and 130.
"""

import sys

try:
    from vot_kernels.extras import imports_for

    with imports_for("vot", "cli"):
        from vot_kernels.cli.app import main as main
except ImportError as error:
    sys.exit(str(error))
except KeyboardInterrupt:  # before `main`, which handles it from then on
    print("Interrupted: nothing was written; run the same command again.", file=sys.stderr)
    sys.exit(130)

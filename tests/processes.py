"""Processes that receive signals."""

import signal


def default_signals() -> None:
    """Serve as `preexec_fn` of a process that a test interrupts: Ctrl-C works in it, however the tests were started.

    A shell starts background processes with SIGINT ignored, children inherit that, and Python then installs no
    handler: the signal would be lost and the test would wait forever.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

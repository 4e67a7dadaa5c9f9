"""Starting processes that are to be sent signals."""

import signal


def default_signals() -> None:
    """`preexec_fn` of a process that a test interrupts: Ctrl-C works in it, however the tests were started.

    A shell starts what runs in its background with SIGINT ignored, children inherit that, and Python then installs
    no handler: the signal would be lost and the test wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

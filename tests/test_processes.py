"""Processes that tests interrupt can be interrupted, however the tests were started."""

import signal
import subprocess
import sys

import pytest

from tests.processes import default_signals

WAITS = """
import sys, time
try:
    print("ready", flush=True)
    time.sleep(300)
except KeyboardInterrupt:
    sys.exit(42)
"""


@pytest.fixture
def ignored():
    """Do what a shell does to a process that it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("start", "heard"), [(default_signals, True), (None, False)])
def test_ctrl_c_is_heard_where_the_tests_ignore_it(start, heard, ignored):
    command = [sys.executable, "-c", WAITS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=start) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        if not heard:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            process.kill()
        assert process.wait(timeout=60) == (42 if heard else -signal.SIGKILL)

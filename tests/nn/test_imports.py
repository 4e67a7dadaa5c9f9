"""`vot_kernels.nn` exports its modules and needs only torch."""

import subprocess
import sys

from vot_kernels import nn

OPTIONAL = ("triton", "transformers", "safetensors", "av", "PIL", "scipy", "rich", "typer")


def test_every_name_is_there():
    assert all(hasattr(nn, name) for name in nn.__all__)
    assert len(set(nn.__all__)) == len(nn.__all__)


def test_nothing_optional_is_imported():
    code = f"import sys, vot_kernels.nn; print(*sorted(set({OPTIONAL}) & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []

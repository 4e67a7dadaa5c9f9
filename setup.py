"""Everything declarative is in pyproject.toml.

This file is where an optional compiled extension is declared. There is none now, so an install compiles
nothing. It must never import torch at module level: building needs setuptools alone.
"""

from setuptools import setup

setup()

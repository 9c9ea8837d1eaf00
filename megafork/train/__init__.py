"""The training step and its parts."""

from megafork.compat import cpu

cpu.install()

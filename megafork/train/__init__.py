"""The training step and what it is made of."""

from megafork.compat import cpu

cpu.install()

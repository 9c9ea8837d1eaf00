"""Process groups and the computations across them: the vocabulary-parallel head and the exact threshold."""

from megafork.compat import cpu

cpu.install()

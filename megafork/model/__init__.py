"""The policy: a megatron-core GPT whose head answers log-prob and entropy at chosen positions."""

from megafork.compat import cpu

cpu.install()

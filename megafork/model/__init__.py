"""The policy: a megatron-core GPT whose head returns log-probs and entropies at chosen positions."""

from megafork.compat import cpu

cpu.install()

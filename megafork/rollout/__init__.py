"""Roll-outs: sampling responses from the current policy with vLLM."""

from megafork.compat import cpu

cpu.install()

"""megafork: reinforcement learning on Megatron, only at a language model's forking tokens."""

__version__ = "0.1.0"

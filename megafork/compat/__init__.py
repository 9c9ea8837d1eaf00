"""Every patch of somebody else's code lives here, each with its reason, the versions it is for, and when it can go.

`tests/test_compat.py` shows for each patch that the unpatched library still fails; a test that no longer can means that the patch
can be deleted.
"""

import os

# Transformer Engine reads this when megatron-core imports it: scales of FP8 blocks in fp32, as vLLM's, and not rounded to powers of two
os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")

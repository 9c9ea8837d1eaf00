"""`megafork convert megatron-to-hf`: python tools/convert/megatron_to_hf.py SRC DST [options]; --help lists them."""

import sys

from megafork.cli import main

sys.argv[1:1] = ["convert", "megatron-to-hf"]
main()

"""`megafork convert hf-to-megatron`: python tools/convert/hf_to_megatron.py SRC DST [options]; --help lists them."""

import sys

from megafork.cli import main

sys.argv[1:1] = ["convert", "hf-to-megatron"]
main()

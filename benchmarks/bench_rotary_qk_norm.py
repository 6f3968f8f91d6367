"""`pmf bench rotary_qk_norm`: see pmf/bench/rotary_qk_norm.py for what is timed."""

import sys

from pmf.bench import main

sys.exit(main(["rotary_qk_norm", *sys.argv[1:]]))

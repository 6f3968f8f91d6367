"""`pmf bench gated_residual`: see pmf/bench/gated_residual.py for what is timed."""

import sys

from pmf.bench import main

sys.exit(main(["gated_residual", *sys.argv[1:]]))

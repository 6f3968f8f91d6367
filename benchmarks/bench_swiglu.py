"""`pmf bench swiglu`: see pmf/bench/swiglu.py for what is timed."""

import sys

from pmf.bench import main

sys.exit(main(["swiglu", *sys.argv[1:]]))

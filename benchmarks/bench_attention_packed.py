"""`pmf bench attention_packed`: see pmf/bench/attention_packed.py for what is timed."""

import sys

from pmf.bench import main

sys.exit(main(["attention_packed", *sys.argv[1:]]))

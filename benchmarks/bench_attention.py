"""`pmf bench attention`: see pmf/bench/attention.py for what is timed."""

import sys

from pmf.bench import main

sys.exit(main(["attention", *sys.argv[1:]]))

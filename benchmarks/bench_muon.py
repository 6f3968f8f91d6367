"""`pmf bench muon`: see pmf/bench/muon.py for what is timed."""

import sys

from pmf.bench import main

sys.exit(main(["muon", *sys.argv[1:]]))

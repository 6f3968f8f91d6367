"""`pmf bench newton_schulz`: see pmf/bench/newton_schulz.py for what is timed."""

import sys

from pmf.bench import main

sys.exit(main(["newton_schulz", *sys.argv[1:]]))

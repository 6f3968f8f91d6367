"""`pmf bench rms_norm`: see pmf/bench/rms_norm.py for what is timed."""

import sys

from pmf.bench import main

sys.exit(main(["rms_norm", *sys.argv[1:]]))

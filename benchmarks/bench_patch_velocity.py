"""`pmf bench patch_velocity`: see pmf/bench/patch_velocity.py for what is timed."""

import sys

from pmf.bench import main

sys.exit(main(["patch_velocity", *sys.argv[1:]]))

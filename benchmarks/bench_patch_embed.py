"""`pmf bench patch_embed`: see pmf/bench/patch_embed.py for what is timed."""

import sys

from pmf.bench import main

sys.exit(main(["patch_embed", *sys.argv[1:]]))

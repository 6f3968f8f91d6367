"""``python -m pmf`` is the command ``pmf``."""

import sys

from pmf.cli import main

sys.exit(main())

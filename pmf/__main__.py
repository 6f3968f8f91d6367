"""``python -m pmf`` runs the command ``pmf``."""

import sys

from pmf.cli import main

sys.exit(main())

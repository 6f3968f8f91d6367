"""What run_all.py runs: sections of cases, checks of every op, targets, and the process that measures."""

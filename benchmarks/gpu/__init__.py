"""The parts of run_all.py: sections of cases, checks of every op, targets, and the measuring process."""

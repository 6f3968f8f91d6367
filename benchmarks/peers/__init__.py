"""Peers of run_all.py besides torch: a plain Triton kernel, and published packages if installed."""

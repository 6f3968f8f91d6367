"""What run_all.py compares with, beside torch: a plain Triton kernel, and published packages if installed."""

"""The parts of ``pmf check``, which tests every op on this machine; tests and GPU runs use the same cases.

tolerance   the allowed distance of a result from float64
cases       an op at one shape: what is computed, and its limits
table       the cases of a check
work        a process that computes them on one device: the CPU at each of its levels, or a GPU
report      runs those processes, survives their crashes, and reports the results
"""

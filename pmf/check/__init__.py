"""Behind ``pmf check``: is every op right on this machine? One table of cases, for the tests and the GPU too.

tolerance   how far a result may be from float64
cases       ops at shapes: what is computed, and by what limits it is judged
table       the cases of a check
work        a process that computes them at one place: the CPU at each of its levels, or a GPU
report      runs those processes, survives them, and says what they found
"""

"""A cycle model of the CUDA kernels: from their machine code to the time a GPU should take.

No GPU is involved: all results are predictions.
"""

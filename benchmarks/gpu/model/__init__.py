"""A cycle model of the CUDA kernels: from their machine code to the time a GPU should take.

No GPU is asked: whatever comes out of here is a prediction.
"""

"""The ptx backend: what nvcc emits for the CUDA kernels, inline assembly included, run by tests/emulator.

`modules` reads PTX, `syntax` takes it apart, `translate` writes each kernel as a C++ function that one fiber
of the emulator runs as one thread, `backend` compiles what a launch asks for and gives it to the emulator.
"""

"""The ptx backend: the code that nvcc emits for the CUDA kernels, assembly included, in the emulator.

`modules` reads PTX, `syntax` parses it, `translate` turns each kernel into a C++ function that a fiber of the
emulator runs as one thread, and `backend` compiles what a launch needs and passes it to the emulator.
"""

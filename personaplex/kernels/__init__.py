"""Numerical kernels. `ops` is the face of this package: one function per operation, which picks Triton, Numba
or plain torch by its own operands. Imports torch (Triton and Numba where they are installed) and nothing else
of this project.
"""

"""The CUDA C++ backend: kernels of csrc/cuda, in a library that is loaded where there is a GPU.

planning.py says which kernel a scan gets, operators.py are the waist's operators, library.py finds
and loads the binary. Importing this package loads nothing.
"""

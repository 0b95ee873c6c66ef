"""The Triton backend: kernels for NVIDIA and AMD GPUs, and the operators that launch them.

    cells.py       the gate equations, forward and backward
    primitives.py  products at a stated precision, where rows and steps lie
    block.py       block scans: the whole sequence in one program per tile of rows
    tiles*.py      one step on tiles of units and rows: the step path and streamed block scans
    matmul.py      the matrix product outside the scans
    launch.py      the operators: checks, outputs, launches
    aot.py         every kernel configuration, compiled for GPUs that are not here

Importing this folder imports nothing; ``launch`` is loaded at the first call.
"""

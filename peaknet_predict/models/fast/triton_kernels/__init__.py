"""Triton kernels of the fast PeakNet; the modules ``triton_*`` beside this package launch them.

A program works on a tile of pixels of one panel, so that sums over a panel need no atomics and are
the same in every run. Pointers to a panel are 64 bits wide, offsets within it 32.

Shape legend: rows are pixels of the tile, K is what a product sums over, L is what it gives.
``*_P`` arguments are powers of two not below the size that they name. EPS is what a LayerNorm, or
GRN, adds to its divisor.
"""

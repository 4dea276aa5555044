"""The CUDA kernels of the peak finder, and the Python that compiles and launches them."""

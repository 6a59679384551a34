"""The CUDA kernels as C++ on the CPU: what they compute, on a machine without a GPU."""

"""Kernels in CUDA C++, built by nvcc when first used. Importing this needs neither: see `gemm.why_not`."""

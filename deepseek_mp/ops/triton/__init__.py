"""The low-precision ops as Triton kernels, for NVIDIA and AMD GPUs with FP8."""

"""The low-precision ops as PyTorch's own libraries have them."""

"""The low-precision ops in plain PyTorch, for any device: what every other implementation is compared with."""

"""The math: conversions between formats, and what is computed from gradients."""

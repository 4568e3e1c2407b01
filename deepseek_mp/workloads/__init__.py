"""The small models and data of the demo and the benchmarks, and what measures this machine."""

"""Helpers for tests of training code: fault injection."""

from deepseek_mp.testing.faults import Fault, FaultInjector, InjectedError

__all__ = ["Fault", "FaultInjector", "InjectedError"]

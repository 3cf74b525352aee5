"""Thousands of requests of all kinds, engines killed among them, both sides counting: `python -m benchmarks.soak`."""

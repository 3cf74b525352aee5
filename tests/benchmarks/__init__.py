"""The benchmarks' own machinery, on small models: what it counts must be true before its numbers are."""

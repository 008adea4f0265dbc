"""Benchmarks: ratios against the raw clients and FastStream, measured in one run. `make bench`."""

"""Tests; they mirror the package. Brokers and faults come from `tests.support`."""

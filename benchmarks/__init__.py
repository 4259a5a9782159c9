"""Benchmarks and the programs that make what they need."""

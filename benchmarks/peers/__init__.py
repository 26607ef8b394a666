"""Measures this system and what people would pick instead on three jobs, in turns: `make bench-peers`."""

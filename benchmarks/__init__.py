"""Each claim about speed as a program: `python -m benchmarks.NAME`."""

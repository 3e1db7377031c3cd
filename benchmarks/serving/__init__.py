"""What an online request costs, end to end: `python -m benchmarks.serving`."""

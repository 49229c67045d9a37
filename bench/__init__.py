"""Each piece beside what you would use instead: `python -m bench` prints the table, `pytest bench` runs it under pytest-benchmark."""

"""Measurements of speed and memory, each a ratio within one run; see `dsv3.tools.bench`."""

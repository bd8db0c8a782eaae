"""Agents: a model plays episodes of `dsv3.environments`, many at once."""

"""Live dashboard: one page on loopback, a file for each view."""

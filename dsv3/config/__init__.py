"""Configuration: composition, preflight checks, arms of a study."""

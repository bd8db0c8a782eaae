"""Expert monitoring: routing statistics, expert load and alerts."""

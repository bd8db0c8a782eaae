"""One module a tool: `python -m dsv3 <tool> key=value ...`."""

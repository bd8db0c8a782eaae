"""Tools of `python -m data`; see `dsv3.cli` for what makes a module one."""

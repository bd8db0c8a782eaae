"""Conformance: `check_<kind>(factory, ...)` raises AssertionError, with a sentence, where a plugin breaks its contract.

They are for anyone's plugins. A factory is what the core gets from the plugin's YAML: called without arguments, it
makes a new plugin.
"""

from dsv3.testing.balancing import check_balancing
from dsv3.testing.router import check_router

__all__ = ["check_balancing", "check_router"]

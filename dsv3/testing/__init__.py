"""Conformance: `check_<kind>(factory, ...)` raises AssertionError, with a sentence, where a plugin breaks its contract.

They are for anyone's plugins. A factory is what the core gets from the plugin's YAML and calls for a new plugin:
without arguments, but for attention and experts (`precision=...`).
"""

from dsv3.testing.attention import check_attention
from dsv3.testing.balancing import check_balancing
from dsv3.testing.experts import check_experts
from dsv3.testing.precision import check_precision
from dsv3.testing.router import check_router

__all__ = ["check_attention", "check_balancing", "check_experts", "check_precision", "check_router"]

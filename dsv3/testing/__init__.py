"""Conformance: `check_<kind>(factory, ...)` raises AssertionError, with a sentence, where a plugin breaks its contract.

They are for anyone's plugins. A factory is what the core gets from the plugin's YAML and calls for a new plugin, with
the arguments that the core gives (docs/plugins.md lists them): none, for most kinds.
"""

from dsv3.testing.attention import check_attention
from dsv3.testing.balancing import check_balancing
from dsv3.testing.callback import check_callback
from dsv3.testing.data import check_data
from dsv3.testing.dispatch import check_dispatch
from dsv3.testing.experts import check_experts
from dsv3.testing.logger import check_logger
from dsv3.testing.memory import check_memory
from dsv3.testing.mtp import check_mtp
from dsv3.testing.objective import check_objective
from dsv3.testing.optimizer import check_optimizer
from dsv3.testing.parallel import check_parallel
from dsv3.testing.precision import check_precision
from dsv3.testing.reward import Marked, check_reward
from dsv3.testing.router import check_router
from dsv3.testing.schedule import check_schedule
from dsv3.testing.tokenizer import check_tokenizer

__all__ = [
    "Marked",
    "check_attention",
    "check_balancing",
    "check_callback",
    "check_data",
    "check_dispatch",
    "check_experts",
    "check_logger",
    "check_memory",
    "check_mtp",
    "check_objective",
    "check_optimizer",
    "check_parallel",
    "check_precision",
    "check_reward",
    "check_router",
    "check_schedule",
    "check_tokenizer",
]

"""Imports and files of train.py, evaluate.py and the tools, read once for what tests/commands.py forks."""

import gc
import importlib
import os
import sys

from hydra import compose, initialize_config_dir

from dsv3.paths import CONF
from tests.once import configs_are_merged_once, configs_are_read_once, lm_eval_is_indexed_once

PATH = [entry for entry in sys.path if entry]
"""Where a new interpreter looks for modules, its script's folder left out."""

MODULES = (
    "dsv3.evaluation.benchmarks.session",
    "dsv3.evaluation.evaluate",
    "dsv3.reporting.page",
    "dsv3.study.report",
    "dsv3.tools.export",
    "dsv3.tools.generate",
    "dsv3.training.fit",
    "dsv3.training.summary",
)

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported
for name in MODULES:
    importlib.import_module(name)
configs_are_read_once()
configs_are_merged_once()
lm_eval_is_indexed_once()
with initialize_config_dir(str(CONF), version_base="1.3"):
    compose("train")
gc.collect()
gc.freeze()  # or each process would look at all of it, and copy it

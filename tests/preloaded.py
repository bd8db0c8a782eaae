"""What train.py, evaluate.py and the tools import and read, once, for the processes that tests/commands.py forks."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported

from hydra import compose, initialize_config_dir

import dsv3.evaluation.benchmarks.session
import dsv3.evaluation.evaluate
import dsv3.reporting.page
import dsv3.study.report
import dsv3.tools.export
import dsv3.tools.generate
import dsv3.training.fit
import dsv3.training.summary  # noqa: F401
from dsv3.paths import CONF
from tests.once import configs_are_read_once, lm_eval_is_indexed_once

configs_are_read_once()
lm_eval_is_indexed_once()
with initialize_config_dir(str(CONF), version_base="1.3"):
    compose("train")
gc.collect()
gc.freeze()  # or each process would look at all of it, and copy it

"""Trains to the end, through the rollbacks of the loss-spike guard."""

import logging
import signal
import time

from omegaconf import DictConfig, OmegaConf

from dsv3.training.callbacks.guard import RollBack
from dsv3.training.callbacks.interruption import leave
from dsv3.training.out_of_memory import explained, is_out_of_memory
from dsv3.training.run import Run, build_run

log = logging.getLogger(__name__)


def fit(config: DictConfig) -> Run:
    """Build the run that `config` describes and train it until it is finished or interrupted.

    An error that ends training is written to the run folder, for reports, and raised.
    """
    began = time.monotonic()
    signal.signal(signal.SIGUSR1, leave)
    while True:
        run = build_run(config)
        if run.interruption is not None:
            run.interruption.began = began
        try:
            run.trainer.fit(run.module, run.data, ckpt_path=run.resume_from, weights_only=True)
        except RollBack as asked:
            log.warning("%s; rolling back to the newest checkpoint", asked)
            run.folder.release()
            if config.resume == "never":  # or what was just trained would be moved aside
                config = OmegaConf.merge(config, {"resume": "auto"})  # type: ignore[assignment]
        except SystemExit as end:
            if isinstance(end.__context__, KeyboardInterrupt):  # of which Lightning makes an exit status of 1
                raise end.__context__ from None
            raise
        except Exception as error:
            told = explained(error, run.config) if is_out_of_memory(error) else error
            run.folder.write_failure(told)
            run.folder.flush(run.module.tokens_seen)
            run.folder.release()
            if told is not error:
                raise told from error
            raise
        else:
            return run

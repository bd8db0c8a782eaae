"""Train a DeepSeek-V3-style model: python train.py [group=option] [key=value] ...   (--help lists them)"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from dsv3.cli import user_errors
from dsv3.config import preflight
from dsv3.runtime import launched_rank


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    with user_errors(Path(config.run.dir)):
        train(config)


def train(config: DictConfig) -> None:
    from dsv3.checkpoint.run_folder import RunFolder
    from dsv3.training.fit import fit
    from dsv3.training.launch import needs_ranks, start_ranks
    from dsv3.training.on_end import end_told
    from dsv3.training.resume import is_finished
    from dsv3.training.summary import conclude, show

    folder = RunFolder(config.run.dir)
    if not is_finished(config, folder):
        with end_told(config):
            if needs_ranks(config):
                status = start_ranks(config)
            else:
                run = fit(config)
                conclude(run)
                run.folder.release()
                status = run.exit_status
            if status:
                sys.exit(status)
        if needs_ranks(config):
            return  # the first of them has shown the run
    if launched_rank() == 0:
        show(folder)


if __name__ == "__main__":
    with user_errors():
        preflight.check_or_exit("train", sys.argv[1:])
        main()

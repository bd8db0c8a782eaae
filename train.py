"""Train a DeepSeek-V3-style model: python train.py [group=option] [key=value] ...   (--help lists them)"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from dsv3.cli import user_errors
from dsv3.config import preflight


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    with user_errors(Path(config.run.dir)):
        train(config)


def train(config: DictConfig) -> None:
    from dsv3.checkpoint.run_folder import RunFolder
    from dsv3.reporting.page import write_run_report
    from dsv3.training.fit import fit
    from dsv3.training.resume import is_finished
    from dsv3.training.summary import show, summarise

    folder = RunFolder(config.run.dir)
    if not is_finished(config, folder):
        run = fit(config)
        if not run.exit_status:
            folder.write_summary(summarise(run))
        write_run_report(folder.path)
        if run.exit_status:
            newest = folder.newest_valid_checkpoint()
            print(f"Interrupted. Rerun the same command to resume from {newest}", file=sys.stderr)
            sys.exit(run.exit_status)
    show(folder)


if __name__ == "__main__":
    with user_errors():
        preflight.check_or_exit("train", sys.argv[1:])
    main()

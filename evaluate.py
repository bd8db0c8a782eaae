"""Evaluate a checkpoint: python evaluate.py checkpoint=RUN [key=value] ...   (--help lists them)"""

import sys

sys.path.pop(0)  # this folder: lm-eval's `import evaluate` means Hugging Face's package, not this file

import hydra
from omegaconf import DictConfig

from dsv3.cli import user_errors
from dsv3.config import preflight


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    from dsv3.evaluation.evaluate import evaluate

    with user_errors():
        evaluate(config)


if __name__ == "__main__":
    with user_errors():
        preflight.check_or_exit("evaluate", sys.argv[1:])
        main()

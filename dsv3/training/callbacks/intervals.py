"""Intervals in tokens: steps seldom end on a multiple."""

from omegaconf import DictConfig, OmegaConf

from dsv3.config.micro_batches import rows_of_steps


def crossed(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]."""
    return after // every > before // every


def most_tokens(config: DictConfig) -> int:
    """That a run trains on: `run.tokens`, or fewer where `trainer.max_steps` ends it before and the settings tell how
    many a step has."""
    steps, length = config.trainer.max_steps, OmegaConf.select(config, "data.sequence_length")
    rows = rows_of_steps(OmegaConf.select(config, "data.global_batch_size"))
    if steps < 0 or not length or not rows:
        return int(config.run.tokens)
    return min(int(config.run.tokens), steps * rows[-1][-1] * length)


def ends_early(config: DictConfig) -> bool:
    """Whether `trainer.max_steps` ends the run before its first checkpoint at an interval: a quick try."""
    return most_tokens(config) < min(config.run.checkpoint_every_tokens, config.run.tokens)

"""Reports of runs and studies: history of a run folder, plots, statistics, pages, dashboard, W&B workspace."""

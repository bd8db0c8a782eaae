"""Training: the LightningModule, the run, resume, callbacks."""

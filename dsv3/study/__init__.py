"""Ablation studies: reports of the paired differences between arms."""

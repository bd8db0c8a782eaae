"""Rewards of reinforcement learning: what a policy's answers are worth."""

"""Simulated tasks, scripted experts, the rollout runner and its report."""

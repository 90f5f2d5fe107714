"""Policies: latent actions, the action decoder, chunk execution, serving and driving an arm."""

"""Dropping visual tokens inside the encoder or the language model, without training."""

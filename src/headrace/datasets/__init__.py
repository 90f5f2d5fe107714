"""Demonstrations, video clips and question sets: reading, writing and normalising."""

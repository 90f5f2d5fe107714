"""One training loop with exact resume, and what it needs."""

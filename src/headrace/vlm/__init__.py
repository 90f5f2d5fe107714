"""Video-language model, its sequence layout and cache, and visual token pruning."""

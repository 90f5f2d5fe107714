"""Network parts shared by tokenizers, language models and policies."""

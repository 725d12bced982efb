"""Prompts of videos, the text encoder, and its embeddings on disk."""

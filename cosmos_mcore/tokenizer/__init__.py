"""Video tokenizers: frames to ids and back."""

"""Generation with a trained model: KV cache, sampling, the video pipeline, pictures of the result."""

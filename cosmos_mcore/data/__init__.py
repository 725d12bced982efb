"""From MP4 files to batches of token ids."""

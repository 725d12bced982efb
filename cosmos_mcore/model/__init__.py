"""The autoregressive video model, from presets to loss."""

"""Post-train, pre-train and sample NVIDIA Cosmos-Predict1's autoregressive video models on Megatron-Core."""

__version__ = "0.1.0"

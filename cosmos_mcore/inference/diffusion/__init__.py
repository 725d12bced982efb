"""The diffusion decoder: ids to sharp frames."""

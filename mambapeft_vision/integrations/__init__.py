"""Doors to other tools: Weights & Biases, the Hugging Face hub, the published code's models."""

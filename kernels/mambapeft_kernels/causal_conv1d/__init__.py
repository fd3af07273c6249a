"""Depthwise causal convolution over tokens, followed by SiLU."""

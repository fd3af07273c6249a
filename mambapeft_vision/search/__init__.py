"""Searches for hybrids and for rates, over runs, with Optuna."""

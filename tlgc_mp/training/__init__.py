"""Recipes, the training loop, metrics and checkpoints."""

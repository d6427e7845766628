"""What saving checkpoints costs."""

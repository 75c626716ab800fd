"""The door to transformers' Trainer: growth, logs, and the best checkpoint."""

"""Pretraining: the engine, the loop, checkpoints and records."""

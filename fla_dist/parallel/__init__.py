"""The ranks, and everything that crosses them except what DeepSpeed sends."""

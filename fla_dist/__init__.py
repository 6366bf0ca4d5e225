"""Long-context pretraining of linear-attention, state-space and hybrid language models."""

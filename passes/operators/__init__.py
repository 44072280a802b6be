"""What is known of each PyTorch operator, in one table, and the trace that applies it."""

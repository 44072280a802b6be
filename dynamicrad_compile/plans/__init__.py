"""Plans: which key/value blocks each query block reads, for a grid of video tokens. No tensor of a model is needed."""

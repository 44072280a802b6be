"""A small video diffusion transformer that is really trained: data, model, training."""

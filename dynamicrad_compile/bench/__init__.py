"""Dense against block-sparse on this machine: attention alone, and a step of a small transformer."""

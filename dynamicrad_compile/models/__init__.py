"""Models by name: presets, models without weights, real ones."""

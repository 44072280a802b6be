"""Models by name: presets, models without weights, real ones; and a hook for a running one's attention."""

"""What a running graph decides: its denoising step, its regime, what was skipped."""

"""Training of a small video diffusion transformer; model and data are in dynamicrad_compile.quality.tiny_video."""

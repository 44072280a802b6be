"""DynamicRad-Compile: block-sparse attention for any video diffusion transformer, as a torch.compile backend."""

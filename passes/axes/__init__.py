"""What the axes of tensors are: labels, and how every operator moves them."""

"""What was done to each attention, why not, and pictures of plans."""

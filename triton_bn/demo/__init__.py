"""Training on real handwritten digits beside torch.nn, alone and under DDP; what is compared, and the picture."""

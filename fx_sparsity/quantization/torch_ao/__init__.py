"""What torch will drop: torch.ao's eager mode, its FX graph mode, and their quantized modules."""

"""Names for those who come from torch.ao.pruning and from torchao."""

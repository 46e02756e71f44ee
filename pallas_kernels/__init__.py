"""Tiled attention kernels: given tiles, a logits object and a schedule, compute. Knows nothing of what a mask means."""

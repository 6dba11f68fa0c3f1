"""Fused ops and the complete method for reinforcement learning without labels. Importing this needs torch alone."""

"""Advantages, losses and their measurements: pure functions on tensors, nothing but torch."""

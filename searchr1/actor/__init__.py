"""Training: packing, packed attention, the FSDP2 backend, checkpoints."""

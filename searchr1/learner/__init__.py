"""The models that are trained: policy, critic and reference model, on FSDP2 or Megatron-Core."""

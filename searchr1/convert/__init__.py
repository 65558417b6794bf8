"""`searchr1 convert`: checkpoints between Megatron's `torch_dist`, FSDP's DCP and Hugging Face folders, tensor by tensor."""

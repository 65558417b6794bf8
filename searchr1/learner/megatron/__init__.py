"""The policy on Megatron-Core. Only `mapping` and `architecture` import without it; the converter needs no more."""

"""Policy and critic on Megatron-Core, which is imported only when one of them starts."""

"""The demo world: a fictional encyclopedia, made from a seed, with questions that need it."""

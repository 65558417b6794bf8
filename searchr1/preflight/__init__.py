"""Everything that is known before a run starts: checks across keys, and the memory plan."""

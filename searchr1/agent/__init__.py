"""The agent: protocol, tools, trajectory, loop."""

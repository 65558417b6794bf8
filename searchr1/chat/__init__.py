"""Ask a trained model with the agent loop of training, observed while it runs."""

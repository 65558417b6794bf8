"""Asking a trained model: the agent loop of training, watched while it runs. Terminal, chat and web page."""

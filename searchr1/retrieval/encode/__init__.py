"""Text to vectors: encoders, and embeddings of a whole corpus."""

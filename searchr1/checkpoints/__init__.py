"""Model shapes, tensor names, checkpoint files and Hugging Face folders, and the conversions between them."""

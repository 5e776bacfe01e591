"""A Hugging Face-compatible zoo of efficient self-attention."""

"""Texts, documents and images, and the windows of tokens cut from them."""

"""Answers of a Hugging Face model on held-out conversations, and their scores."""

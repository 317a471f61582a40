"""The model: vision encoder, projectors, expansion inside the decoder, and the whole."""

"""Chat with a model about pictures, in a terminal or on a local page."""

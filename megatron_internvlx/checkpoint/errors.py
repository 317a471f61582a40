"""What a conversion tells its user."""


class ConversionError(ValueError):
    """A directory, checkpoint or combination of settings that cannot be converted; the message says why."""

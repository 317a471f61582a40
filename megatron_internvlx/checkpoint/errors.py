"""Errors of conversions."""


class ConversionError(ValueError):
    """Error for a directory, checkpoint or combination of settings that cannot be converted, with the reason."""

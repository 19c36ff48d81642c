"""The one base of errors that are the user's to mend."""


class JaxformerError(ValueError):
    """Bad input or a bad request; the message is one line that names the fix."""

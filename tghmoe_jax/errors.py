"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A fault in what the user gave. The message is one sentence that names the file or flag and the mend."""

"""The one exception for what a user can get wrong."""


class UserError(ValueError):
    """A setting, a file or a document is wrong. The message gives the setting (or file and line), the value, the rule
    and the fix; the commands print it without a traceback and exit with code 2."""

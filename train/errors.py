"""What ends a run on purpose."""


class UserError(ValueError):
    """A setting, a file or a document is wrong. The message gives the setting (or file and line), the value, the rule
    and the fix; the commands print it without a traceback and exit with code 2."""

    code = 2  # of train/sft.py and what else `guarded` runs


class Held(UserError):
    """Another process holds what this one needs. It may go by itself, so that job scripts try a run again."""

    code = 1


class Interrupted(RuntimeError):
    """The run was told to end, and ends here; the message says after which step it has saved."""


class NonFiniteLoss(UserError):
    """The loss is NaN or infinite; the message names the step and the documents. The same settings would come to the
    same, so that it is the user's to mend."""

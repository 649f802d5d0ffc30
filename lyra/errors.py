"""The one exception that means "the user can fix this": its text is a single sentence with a way out.

The command line prints it without a traceback and the app shows it beside the control that caused it. Everything else
is a bug and keeps its traceback.
"""


class UserError(ValueError):
    """What is wrong and what to do about it, in one clear sentence."""

"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A user's mistake or a broken surrounding (file, port, server), told in one message.

    The command line prints the message without a traceback and exits with 2. The message names the key,
    file or line and says what to do.
    """

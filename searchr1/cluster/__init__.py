"""Worker groups on Ray, started through RLinf's scheduler; no algorithm lives here."""

import os

os.environ.setdefault("RLINF_LOG_LEVEL", "WARNING")  # read when RLinf is first imported

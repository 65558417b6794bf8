"""One file per sub-command of `searchr1`: parse arguments, load, check, call."""

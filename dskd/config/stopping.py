"""How a run is asked to stop, and how it says that it is not finished: one answer for training and for the launcher."""

import signal

UNFINISHED = 75
"""Exit code for "not finished, run me again" (EX_TEMPFAIL)."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

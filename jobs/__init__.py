"""One file per Ray job."""

import os

# Ray reads it when it is imported. A Ray of this machine alone has no dashboard, and without one Ray Train says every
# second that it cannot ask it whether its controller lives.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "Failed to query Ray Train Controller actor state")

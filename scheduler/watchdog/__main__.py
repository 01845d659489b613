"""`python -m scheduler.watchdog` watches this host."""

import sys

from scheduler.watchdog.watchdog import main

if __name__ == "__main__":
    sys.exit(main())

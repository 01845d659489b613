"""`python -m scheduler` is the command."""

from scheduler.cli.schedule import main

if __name__ == "__main__":
    main()

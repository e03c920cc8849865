"""One file for each command, and how they are configured."""

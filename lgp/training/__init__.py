"""One training loop: optimizer and schedule, resume states, progress."""

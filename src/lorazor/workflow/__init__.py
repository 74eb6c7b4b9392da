"""What each command does from start to end, written into a run folder."""

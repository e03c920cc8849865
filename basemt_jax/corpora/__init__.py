"""From downloaded archives to training files."""

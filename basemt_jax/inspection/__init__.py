"""What text, sampling and runs look like."""

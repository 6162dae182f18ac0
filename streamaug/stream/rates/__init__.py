"""What is counted while a stream runs, and what is said of it."""

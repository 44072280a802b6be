"""What several test files need: cases, references, captured graphs."""

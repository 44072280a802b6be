"""The rules that the table of operators refers to, by kind: what one operator, or a family of them, does."""

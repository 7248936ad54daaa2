"""What a person reads: text and HTML."""

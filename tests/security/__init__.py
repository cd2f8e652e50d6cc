"""What somebody else's files may not do."""

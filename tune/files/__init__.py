"""Files as the disk and other people leave them: what the system refuses, what is no plain file, what is a pickle."""

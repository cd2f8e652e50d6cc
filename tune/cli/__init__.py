"""The command line: the only rooms that print. Each verb imports what it needs when it is called."""

"""`python -m tune`, for launchers and for environments where another package owns the `tune` command."""

from tune.cli.main import main

if __name__ == "__main__":
    main()

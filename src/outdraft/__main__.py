"""`python -m outdraft`: the command line."""

from outdraft.cli.main import main

if __name__ == "__main__":
    main()

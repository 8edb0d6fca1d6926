"""`python -m fedclip`: the command where its script is not on the path."""

from fedclip.cli.main import main

if __name__ == "__main__":
    main()

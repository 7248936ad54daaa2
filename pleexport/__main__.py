"""`python -m pleexport`: the command line."""

from pleexport.cli import main

if __name__ == "__main__":
    main()

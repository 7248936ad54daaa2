"""`python -m pleexport`: the command line."""

from pleexport.cli import main

main()

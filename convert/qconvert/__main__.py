"""`python -m qconvert` is the command `qconvert`."""

from qconvert.cli import main

main()

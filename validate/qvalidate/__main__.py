"""`python -m qvalidate` is the command `qvalidate`."""

from qvalidate.cli import main

main()

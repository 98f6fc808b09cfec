"""`python -m qschema` is the command `qschema`."""

from qschema.cli import main

main()

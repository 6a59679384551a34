"""`python -m dfq` is the command `dfq`."""

from dfq.cli.app import main

main()

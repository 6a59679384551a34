"""`python -m dfq` is the command `dfq`."""

from dfq.cli import main

main()

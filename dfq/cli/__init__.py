"""The command line `dfq`."""

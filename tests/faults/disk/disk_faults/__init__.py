"""What the tests of faults of the disk share; ``tests/faults/README.md`` tells how it is used."""

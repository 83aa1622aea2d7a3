"""`python -m dear_batch`."""

from dear_batch.cli import main

main()

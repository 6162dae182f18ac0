"""`python -m streamaug` is the `streamaug` command."""

from streamaug.cli import main

main()

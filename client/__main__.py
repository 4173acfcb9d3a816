"""`python -m offsite.client` is `offsite`."""

from offsite.client.cli import main

main()

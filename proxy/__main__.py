"""`python -m proxy` is `tollgate`."""

from proxy.cli import main

main()

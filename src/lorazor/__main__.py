"""`python -m lorazor`, and `accelerate launch -m lorazor ...` on several processes."""

from lorazor.cli.app import main

main()

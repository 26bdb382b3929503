"""`python -m instaflow`, and `accelerate launch -m instaflow` for many processes."""

from instaflow.cli import main

main()

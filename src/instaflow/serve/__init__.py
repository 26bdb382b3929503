"""The HTTP API and its page: what `instaflow serve` starts."""

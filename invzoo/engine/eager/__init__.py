"""The eager engine: watched calls, the slots between them, and their replays."""

"""The loop that both stages share, and what differs between them."""

"""What several commands share; nothing in here knows any one of them."""

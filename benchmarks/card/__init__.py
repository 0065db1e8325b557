"""A card's proof in a few calls: its parts, the tests over all cores, and what is carried home."""

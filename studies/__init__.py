"""Do the layers learn what the paper says? Runs whose results are committed, and the page written from them."""

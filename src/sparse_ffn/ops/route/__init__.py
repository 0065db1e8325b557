"""Route: which experts each token goes to, for routers that are a linear map, a top-k and a gate."""

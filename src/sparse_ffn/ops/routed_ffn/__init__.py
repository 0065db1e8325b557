"""Routed FFN: routing and the expert FFN in one op, for routers that are a linear map, a top-k and a gate."""

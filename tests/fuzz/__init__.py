"""What the fuzz test is made of: numbers that hypothesis draws, sums in float64, and what may differ from them."""

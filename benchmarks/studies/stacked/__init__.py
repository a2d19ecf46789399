"""Cut, then quantise: every way to a faster file in one table, the cheap ones among them."""

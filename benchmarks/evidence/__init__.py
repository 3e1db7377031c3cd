"""What the method is worth on real data sets: every method tuned alike, tested with several seeds, and a page of it all."""

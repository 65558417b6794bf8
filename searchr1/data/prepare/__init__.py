"""`searchr1 prepare-data`: question sets, public or one's own, into the files that training and evaluation read."""

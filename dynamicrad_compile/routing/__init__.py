"""Fitting the motion router: encoders, the labelled corpus, the classifier."""

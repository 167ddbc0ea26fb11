"""Base classes that several methods share. A method file never imports another method."""

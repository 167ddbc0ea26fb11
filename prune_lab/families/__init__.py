"""What several methods share: classes to derive from. A method file itself never imports another method."""

"""One phase at work: the only training loop, the only evaluation, and the arithmetic they run in."""

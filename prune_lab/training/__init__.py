"""One phase at work: the only training loop, the only evaluation, and device and precision they run in."""

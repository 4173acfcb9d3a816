"""What either end tells those who look after it: metrics, whether it lives and is ready, and its log."""

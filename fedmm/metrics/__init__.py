"""What clients and servers measure."""

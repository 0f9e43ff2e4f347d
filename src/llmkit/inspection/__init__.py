"""What is inside a model, as plain values; doors show them."""

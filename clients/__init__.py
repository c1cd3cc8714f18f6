"""The client side: a Flower ClientApp and local training."""

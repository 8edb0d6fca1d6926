"""What is done with a trained adapter: predict, serve, export, merge, publish."""

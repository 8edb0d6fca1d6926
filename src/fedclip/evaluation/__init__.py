"""How good a model is, centrally and for each client."""

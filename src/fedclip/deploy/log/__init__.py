"""The signed log of a coordinator or a site."""
